"""Writing configuration and canonical weights as a folder for Hugging Face's `from_pretrained`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bov_megatron.data.files import full_disk_message, json_bytes, whole_folder, why_full
from bov_megatron.errors import ExportError
from bov_megatron.exchange.model_card import model_card
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import parameter_specs

if TYPE_CHECKING:
    from bov_megatron.exchange.hf.configuration_bov import BovConfig

SHIPPED_FILES = ("configuration_bov.py", "modeling_bov.py")
TRAINING_FILE = "training.json"
"""What only training on needs: recipe, step and data of the run."""
AUTO_MAP = {
    "AutoConfig": "configuration_bov.BovConfig",
    "AutoModel": "modeling_bov.BovModel",
    "AutoModelForCausalLM": "modeling_bov.BovForCausalLM",
}
TABLE_DTYPES = ("bf16", "int8")
"""What value tables may be stored in apart from the other weights."""
DEFAULT_SHARD_BYTES = 4 << 30


def hf_config(model: ModelConfig, **options: Any) -> BovConfig:
    """The exported model's configuration; `options` are its fields that no recipe has: bos_token_id, bank_device etc.

    `BovForCausalLM(hf_config(model)).load_state_dict(weights)` takes canonical names.
    """
    from bov_megatron.exchange.hf.configuration_bov import BovConfig

    return BovConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=model.sequence_length,
        windows=model.windows(),
        value_source=model.value.source,
        value_source_facts=dataclasses.asdict(model.value.facts),
        target_layers=model.layers_from_source(),
        value_coefficient=model.value.coefficient,
        value_table=model.value.table,
        rotary_base=model.rotary_base,
        logit_softcap=model.logit_softcap,
        qk_scale=model.qk_scale,
        **options,
    )


def export(
    state: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    model: ModelConfig,
    tokenizer_dir: str | Path | None,
    out_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tables: str | None = None,
    recipe: Mapping | None = None,
    trained: Mapping | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a folder that loads with `AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True)`.

    Args:
        state: all tensors of `parameter_specs(model)`, unpadded, by canonical name, in any order; at most
            `max_shard_bytes` of an iterator are held at a time.
        tokenizer_dir: folder of a Hugging Face tokenizer with a bos_token; `None` exports without one.
        dtype: of the stored weights.
        tables: of the stored value tables, one of TABLE_DTYPES (int8 has a scale per row); None means `dtype`.
        recipe: the resolved recipe (`Recipe.to_dict()`), for the model card and for training on.
        trained: what `training_record` says of the weights, for the model card and for training on.
        overwrite: replace `out_dir` if it isn't empty.
        check: called with the complete folder before it takes its place; if it raises, nothing has changed.

    The folder appears complete or not at all. Raises ExportError if weights are missing, unexpected or of another
    shape, if the tokenizer doesn't fit, if `out_dir` isn't empty, or if it cannot be written.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise ExportError(f"{out_dir} is a file; give a folder to write to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise ExportError(f"{out_dir} is not empty; choose another folder, or pass overwrite (--overwrite)")
    needed = stored_bytes(model, dtype, tables)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(out_dir.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with whole_folder(out_dir) as partial:
            token_ids = _write_tokenizer(tokenizer_dir, model, partial) if tokenizer_dir is not None else {}
            _write_config(model, token_ids, dtype, tables, partial)
            tensors = state.items() if isinstance(state, Mapping) else state
            _write_weights(tensors, model, dtype, tables, max_shard_bytes, partial)
            if recipe is not None:
                (partial / TRAINING_FILE).write_bytes(json_bytes({"recipe": dict(recipe), **(trained or {})}))
            (partial / "README.md").write_text(model_card(model, dtype, recipe, trained, tables))
            check(partial)
    except Exception as error:
        if reason := why_full(error):
            remedy = "free space there, or give another OUT (a bfloat16 export takes half of a float32 one)"
            raise ExportError(full_disk_message(out_dir, reason, needed, remedy)) from None
        if isinstance(error, OSError) and error.errno:
            raise ExportError(f"could not write {out_dir}: {error.strerror} ({error.filename or out_dir})") from None
        raise
    return out_dir


def stored_bytes(model: ModelConfig, dtype: torch.dtype, tables: str | None) -> int:
    """Bytes of the weights in an export."""
    total = 0
    for spec in parameter_specs(model):
        if spec.kind == "table" and tables == "int8":
            total += spec.size + spec.shape[0] * torch.bfloat16.itemsize
        else:
            total += spec.size * (torch.bfloat16 if spec.kind == "table" and tables == "bf16" else dtype).itemsize
    return total


def raise_if_different(shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Raise ExportError unless names and shapes are those of `parameter_specs`."""
    expected = {spec.name: spec.shape for spec in parameter_specs(model)}
    problems = []
    if missing := expected.keys() - shapes.keys():
        problems.append(f"missing: {', '.join(sorted(missing))}")
    if unexpected := shapes.keys() - expected.keys():
        problems.append(f"unexpected: {', '.join(sorted(unexpected))}")
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            problems.append(f"{name} is {list(shapes[name])}, expected {list(expected[name])}")
    if problems:
        raise ExportError("the weights don't fit the model: " + "; ".join(problems))


def _write_tokenizer(tokenizer_dir: str | Path, model: ModelConfig, out: Path) -> dict[str, int]:
    """Save the tokenizer to `out`; returns its special ids by configuration field."""
    from transformers import AutoTokenizer

    if not (Path(tokenizer_dir) / "tokenizer.json").is_file():
        raise ExportError(f"tokenizer {tokenizer_dir}: no tokenizer.json there; give a Hugging Face tokenizer folder")
    tokenizer = AutoTokenizer.from_pretrained(
        str(tokenizer_dir),
        local_files_only=True,
        # Stored with the tokenizer: generation needs padding on the left, and `generate` rejects token_type_ids.
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    if tokenizer.bos_token is None:
        raise ExportError(f"tokenizer {tokenizer_dir} has no bos_token, which opens documents; set one in its files")
    if len(tokenizer) > model.vocab_size:
        raise ExportError(
            f"tokenizer {tokenizer_dir} has {len(tokenizer)} ids, but model.vocab_size is {model.vocab_size}; "
            "give the tokenizer the model was trained with"
        )
    # <|bos|> opens each document and so ends the one before; padding is masked, so it may be any token.
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, tokenizer.bos_token)
    tokenizer.model_max_length = model.sequence_length
    tokenizer.save_pretrained(out)
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def _write_config(
    model: ModelConfig, token_ids: dict[str, int], dtype: torch.dtype, tables: str | None, out: Path
) -> None:
    config = hf_config(model, table_dtype="int8" if tables == "int8" else None, **token_ids)
    from transformers import GenerationConfig

    config.auto_map = dict(AUTO_MAP)
    config.architectures = ["BovForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(out)
    GenerationConfig(**token_ids).save_pretrained(out)
    for name in SHIPPED_FILES:
        shutil.copyfile(Path(__file__).parent / "hf" / name, out / name)


def quantize_rows(table_VK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows `[V, K]` and their scales `[V, 1]`, whose products are close to the table.

    A scale is a bf16 number, so it is the same in whatever dtype a model is loaded.
    """
    scale_V1 = (table_VK.float().abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    scale_V1 = scale_V1.where(scale_V1 > 0, 1)
    rows_VK = (table_VK.float() / scale_V1.float()).round().clamp(-127, 127)
    return rows_VK.to(torch.int8), scale_V1


def rounded_table(table_VK: torch.Tensor, tables: str) -> torch.Tensor:
    """The table, in fp32, as it is once it has been stored in one of TABLE_DTYPES."""
    if tables == "int8":
        rows_VK, scale_V1 = quantize_rows(table_VK)
        return rows_VK.float() * scale_V1.float()
    return table_VK.to(torch.bfloat16).float()


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype, tables: str | None) -> dict[str, torch.Tensor]:
    """A weight as its file has it; `tables` is None for all but value tables."""
    if tables == "int8":
        rows, scales = quantize_rows(tensor.detach())
        return {name: rows.cpu(), name.removesuffix("weight") + "row_scale": scales.cpu()}
    # Copied, because views of one storage can't be saved in one file.
    dtype = torch.bfloat16 if tables == "bf16" else dtype
    return {name: tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()}


def _write_weights(
    state: Iterable[tuple[str, torch.Tensor]],
    model: ModelConfig,
    dtype: torch.dtype,
    tables: str | None,
    max_bytes: int,
    out: Path,
) -> None:
    """Stream tensors into safetensors files of at most `max_bytes` (or one tensor), with an index if several."""
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {}
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0
    table_names = {spec.name for spec in parameter_specs(model) if spec.kind == "table"}

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            shards.append(list(pending))
            file = out / f"shard-{len(shards)}.safetensors"
            save_file(pending, file, metadata={"format": "pt"})
            shutil.copymode(out / "config.json", file)  # what the umask says; safetensors gives 0600
            pending.clear()
            pending_bytes = 0

    for name, tensor in state:
        if name in shapes:
            raise ExportError(f"weight {name} is given twice")
        shapes[name] = tuple(tensor.shape)
        stored = _stored(name, tensor, dtype, tables if name in table_names else None)
        size = sum(part.nbytes for part in stored.values())
        if pending_bytes + size > max_bytes:
            flush()
        pending |= stored
        pending_bytes, total = pending_bytes + size, total + size
    flush()
    raise_if_different(shapes, model)
    if len(shards) == 1:
        (out / "shard-1.safetensors").rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
