"""Converting a run's checkpoint, of any parallel layout, to a Hugging Face folder."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bov_megatron import checkpoint
from bov_megatron.checkpoint import compatibility
from bov_megatron.engines.base import Engine
from bov_megatron.engines.build import build_engine
from bov_megatron.errors import ExportError
from bov_megatron.exchange.export import DEFAULT_SHARD_BYTES, export, hf_config, rounded_table
from bov_megatron.exchange.model_card import training_record
from bov_megatron.exchange.needs import Needs, check_memory_of_parity, needs_of_export
from bov_megatron.exchange.parity import Parity, compare_logits, number_of_ids
from bov_megatron.lifecycle import run_folder
from bov_megatron.model.naming import full_from_gathered
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.device import WithoutMemory, device
from bov_megatron.parallel.launch import World
from bov_megatron.recipe import ModelConfig, ParallelConfig, Recipe, recipe_from_dict
from bov_megatron.recipe.checks import check_recipe

if TYPE_CHECKING:
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

PARITY_TOLERANCE = 1e-4
"""Maximum relative error of logits computed in fp32 from the same stored weights."""


@dataclass(frozen=True)
class Conversion:
    out_dir: Path
    checkpoint: Path
    step: int
    parity: Parity | None
    """Of the exported model's logits with the Megatron model's, rounded alike; None if not checked."""
    cost_of_tables: Parity | None
    """With those of tables that are stored like the other weights; None if they are."""
    has_tokenizer: bool


def to_hf(
    run_dir: Path,
    out_dir: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tables: str | None = None,
    tokenizer_dir: Path | None = None,
    check_parity: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Conversion:
    """Export a run's checkpoint as a Hugging Face model. Holds the weights of one file of the export at a time; to
    compare logits, the whole model in fp32.

    Args:
        run_dir: run folder (the newest checkpoint, or that of `step`), or one checkpoint's folder.
        dtype: of the stored weights; None means that of the run's computation.
        tables: of the stored value tables, as in `export`.
        tokenizer_dir: None means the run's, and none where it has none.
        check_parity: compare logits with the Megatron model's, and export nothing if they differ by more than
            PARITY_TOLERANCE.
        max_shard_bytes: of a file of the export.

    Raises CheckpointError or ExportError.
    """
    path = run_folder.find_checkpoint(run_dir, step)
    stored = checkpoint.read_run(path)
    dtype = dtype or _computed_in(stored["recipe"])
    tokenizer_dir = tokenizer_dir or _tokenizer_of(run_folder.run_dir_of(path))
    model = model_of(path)
    if check_parity:
        check_memory_of_parity(needs_of_export(model, dtype, tables, max_shard_bytes))
    parity: list[tuple[Parity, Parity | None]] = []

    def compare(folder: Path) -> None:
        if check_parity:
            parity.append(_parity(path, folder, dtype, tables))

    with contextlib.closing(stored_tensors(path)) as tensors:
        out_dir = export(
            tensors,
            model,
            tokenizer_dir,
            out_dir,
            dtype=dtype,
            tables=tables,
            recipe=stored["recipe"],
            trained=training_record(path, stored),
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            check=compare,
        )
    agreement, cost_of_tables = parity[0] if parity else (None, None)
    return Conversion(out_dir, path, stored["step"], agreement, cost_of_tables, tokenizer_dir is not None)


def plan_to_hf(
    run_dir: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tables: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Needs:
    """What `to_hf` needs with these arguments. Raises CheckpointError."""
    path = run_folder.find_checkpoint(run_dir, step)
    dtype = dtype or _computed_in(checkpoint.read_run(path)["recipe"])
    return needs_of_export(model_of(path), dtype, tables, max_shard_bytes)


def model_of(path: Path) -> ModelConfig:
    """The model of a checkpoint. Raises CheckpointError."""
    return _recipe_to_open(path).model


def _tokenizer_of(run_dir: Path) -> Path | None:
    folder = run_dir / run_folder.TOKENIZER
    return folder if folder.is_dir() else None


def in_memory(path: Path, dtype: torch.dtype | None = None, bank_device: str | None = None) -> BovForCausalLM:
    """The model that `to_hf` would export of a checkpoint, without the folder: on the CPU, in evaluation mode.

    `dtype` None means that of the run's computation, as in `to_hf`; `bank_device` may be `cpu`. Raises CheckpointError.
    """
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    dtype = dtype or _computed_in(checkpoint.read_run(path)["recipe"])
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in stored_tensors(path)}
    config = hf_config(_recipe_to_open(path).model, bank_device=bank_device)
    with torch.device("meta"):
        model = BovForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _computed_in(recipe: dict) -> torch.dtype:
    return torch.bfloat16 if recipe["train"]["precision"] == "bf16" else torch.float32


@contextlib.contextmanager
def open_checkpoint(
    path: Path,
    layout: ParallelConfig | None = None,
    precision: Literal["fp32", "bf16"] | None = "fp32",
    world: World | None = None,
) -> Iterator[Engine]:
    """An engine without optimizer, with the weights of a checkpoint of any layout; by default unsharded, in fp32.

    Args:
        layout: of this process's ranks; None is one rank.
        precision: of the computation; None is the run's.
        world: the ranks that open it together; collective over them.

    Raises CheckpointError, or RecipeError for a layout that the model can't have.
    """
    with new_engine(_recipe_to_open(path, layout, precision), world) as engine:
        checkpoint.load(engine, path, contents=True)
        yield engine


def _recipe_to_open(
    path: Path, layout: ParallelConfig | None = None, precision: Literal["fp32", "bf16"] | None = "fp32"
) -> Recipe:
    """A checkpoint's recipe with another layout and precision, as `open_checkpoint` takes them."""
    recipe = recipe_from_dict(compatibility.without_retired_values(checkpoint.read_run(path)["recipe"]))
    train = recipe.train if precision is None else dataclasses.replace(recipe.train, precision=precision, fp8="none")
    recipe = dataclasses.replace(recipe, parallel=layout or ParallelConfig(), train=train)
    check_recipe(recipe)
    return recipe


def stored_tensors(path: Path) -> Generator[tuple[str, Tensor], None, None]:
    """A checkpoint's weights in fp32 by canonical name, unfused and unpadded, some at a time; in process groups of its
    own until the last one. Raises CheckpointError."""
    with engine_without_memory(_recipe_to_open(path)) as engine:
        for local, tensor in checkpoint.read_weights(engine, path):
            yield from full_from_gathered(local, tensor).items()


@contextlib.contextmanager
def engine_without_memory(recipe: Recipe) -> Iterator[Engine]:
    """An engine of one rank whose parameters are shapes alone (parallel.device.WithoutMemory), in process groups of its
    own."""
    value = dataclasses.replace(recipe.model.value, table_memory="device")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, value=value))
    with _process_groups(recipe):
        with WithoutMemory():
            engine = build_engine(recipe, with_optimizer=False)
        yield engine


@contextlib.contextmanager
def new_engine(recipe: Recipe, world: World | None = None) -> Iterator[Engine]:
    """An engine without optimizer, with initial weights, in process groups of its own; `world` as above."""
    with _process_groups(recipe, world):
        yield build_engine(recipe, with_optimizer=False)


@contextlib.contextmanager
def _process_groups(recipe: Recipe, world: World | None = None) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        if world is None:
            process_groups.initialize(recipe, 0, 1, init_method=f"file://{folder}/rendezvous")
        else:
            process_groups.initialize(recipe, world.rank, world.world_size, world.local_rank)
        try:
            yield
        finally:
            process_groups.shutdown()


def _parity(path: Path, out_dir: Path, dtype: torch.dtype, tables: str | None) -> tuple[Parity, Parity | None]:
    """The exported model's logits against the Megatron model's on random ids; and, where `tables` are stored apart,
    against those of tables in `dtype`. Holds one model at a time, in fp32.

    The Megatron model's weights are rounded as the stored ones are. Raises ExportError beyond PARITY_TOLERANCE.
    """
    model = model_of(path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (1, number_of_ids(model)), generator=generator)
    found = _exported_logits(out_dir, ids)
    parity = compare_logits(found, _megatron_logits(path, ids, dtype, tables))
    if not parity.relative_error <= PARITY_TOLERANCE:
        raise ExportError(
            f"the exported model's logits differ from the Megatron model's by {parity.relative_error:.1e} (relative; "
            f"at most {PARITY_TOLERANCE:.0e} is rounding), so nothing was written; please report it with the recipe"
        )
    return parity, None if tables is None else compare_logits(found, _megatron_logits(path, ids, dtype, None))


@torch.no_grad()
def _exported_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits `[1, ids, vocabulary]` of an export, computed in fp32."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return exported.eval()(ids).logits


@torch.no_grad()
def _megatron_logits(path: Path, ids: Tensor, dtype: torch.dtype, tables: str | None) -> Tensor:
    """Logits `[1, ids, vocabulary]` of a checkpoint, computed in fp32 from weights rounded as in an export."""
    with new_engine(_recipe_to_open(path)) as engine:
        for local, tensor in checkpoint.read_weights(engine, path):
            apart = tables if local.kind == "table" else None
            local.parameter.copy_(tensor.to(dtype) if apart is None else rounded_table(tensor, apart))
        return engine.model.eval()(ids.to(device())).cpu()[..., : engine.recipe.model.vocab_size]
