"""A checkpoint of the paper's reference implementation (arXiv 2606.02780, a fork of nanochat) into a run of ours.

    CHECKPOINT_DIR/model_003766.pt     weights by the reference's names, vocabulary padded to a multiple of 64
    CHECKPOINT_DIR/meta_003766.json    `model_type`, `model_config` (sizes and flags), `user_config` (arguments), …

`model_type` gives the flags' defaults, `model_config` their values. Optimizer state (optim_*.pt) is not read.
"""

from __future__ import annotations

import functools
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bov_megatron.data.tokenizer import copy_tokenizer, load_encoder
from bov_megatron.errors import ConversionError, RecipeError
from bov_megatron.exchange.nanochat_tokenizer import TOKENIZER_FILE, read_encoding, write_tokenizer
from bov_megatron.exchange.needs import Needs, needs_of_run
from bov_megatron.exchange.new_run import NewRun, check_is_new, write_run
from bov_megatron.recipe import ModelConfig, Recipe, recipe_from_dict
from bov_megatron.recipe.parameters import VOCABULARY_KINDS, ParameterSpec, parameter_specs

FAMILY = "gpt_base"
"""The reference's model that ours computes; its variants are named gpt_base_…."""
SOURCES = {
    "v_from_value_emb": "bank",
    "v_from_x0": "embedding_projection",
    "v_from_v1": "first_layer",
    "v_scale_learn": "scaled_projection",
    "add_init_v": "projection_plus_first_layer",
    "add_init_res_v": "projection_plus_embedding",
    "add_init_value_emb": "projection_plus_bank",
    "add_init_value_emb_nanogpt": "gated_value_embedding",
}
"""The reference's flag -> our value source."""
TARGETS = {
    "on_every_layer": "every",
    "on_every_two_layers": "every_second",
    "on_second_half_layers": "second_half",
    "on_last_two_thirds_layers": "last_two_thirds",
}
"""The reference's flag -> our target layers; the first that is set holds, none means the last third."""
LEARNED, SHARED = "learn_init_coeffs", "value_emb_shared"
_NEVER_FIXED = ("scaled_projection", "gated_value_embedding")
"""Sources that the reference has in one form: with a coefficient, or with none to learn."""
_SUFFIXES = {
    "_every_layer": "on_every_layer",
    "_every2": "on_every_two_layers",
    "_second_half": "on_second_half_layers",
    "_last_two_thirds": "on_last_two_thirds_layers",
    "_shared": SHARED,
    "_learn": LEARNED,
}
"""How a variant's name ends, from the last to the first -> the flag that it sets."""
_SIZES = {
    "sequence_len": "sequence_length",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_query_groups",
    "n_embd": "hidden_size",
}
_RATES = {
    "matrix_lr": "matrix_lr",
    "embedding_lr": "embedding_lr",
    "unembedding_lr": "output_lr",
    "scalar_lr": "coefficient_lr",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "warmdown_ratio": "warmdown_ratio",
    "final_lr_frac": "final_lr_fraction",
}
"""The reference's argument -> our field of `optimizer`."""
_NAMES = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.smear.gate.weight": "smear_gate.weight",
    "model.smear.scale": "smear_lambda",
    "lm_head.weight": "lm_head.weight",
    "self_attn.q_proj.weight": "attn.c_q.weight",
    "self_attn.k_proj.weight": "attn.c_k.weight",
    "self_attn.v_proj.weight": "attn.c_v.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "self_attn.value_gate.weight": "attn.ve_gate.weight",
    "self_attn.projection_coefficient": "attn.alpha_v",
    "mlp.up_proj.weight": "mlp.c_fc.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
"""Our canonical name, in a layer without its prefix -> the reference's."""
VOCABULARY_MULTIPLE = 64
_MODEL_FILE = re.compile(r"model_(\d+)\.pt")


def from_nanochat(
    checkpoint_dir: Path, run_dir: Path, *, step: int | None = None, tokenizer_dir: Path | None = None
) -> NewRun:
    """Make a run folder whose only checkpoint holds the reference's weights, at their step.

    Args:
        step: which checkpoint; None means the newest.
        tokenizer_dir: folder with the reference's tokenizer.pkl, or with a Hugging Face tokenizer.json.

    Raises ConversionError; nothing is then left of `run_dir`.
    """
    check_is_new(run_dir)
    found = read_checkpoint(checkpoint_dir, step)
    recipe = recipe_of(found)
    weights = _Weights(found.weights, recipe.model, found.path)
    return write_run(
        run_dir,
        recipe,
        weights,
        step=found.step,
        origin={
            "nanochat": str(found.path.resolve()),
            "step": found.step,
            **{key: found.meta.get(key) for key in ("model_type", "val_bpb", "dataloader_state_dict")},
        },
        write_tokenizer=_tokenizer_writer(tokenizer_dir, recipe.model.vocab_size) if tokenizer_dir else None,
    )


def plan_from_nanochat(checkpoint_dir: Path, *, step: int | None = None) -> Needs:
    """What `from_nanochat` needs. Raises ConversionError as it does."""
    return needs_of_run(recipe_of(read_checkpoint(checkpoint_dir, step)).model)


@dataclass(frozen=True)
class NanochatCheckpoint:
    path: Path
    """Of the weights."""
    step: int
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    """By the reference's names; mapped from the file, read where they are used."""


def read_checkpoint(folder: Path, step: int | None = None) -> NanochatCheckpoint:
    """Open a checkpoint of `step`, or the newest, without reading its weights. Raises ConversionError."""
    steps = {int(match[1]): path for path in _listing(folder) if (match := _MODEL_FILE.fullmatch(path.name))}
    if not steps:
        inside = [path.name for path in _listing(folder) if path.is_dir() and any(path.glob("model_*.pt"))]
        hint = f"; there are some in {', '.join(sorted(inside))}" if inside else ""
        raise ConversionError(f"{folder} holds no model_*.pt, so it is not a checkpoint directory of nanochat{hint}")
    if step is not None and step not in steps:
        raise ConversionError(f"{folder} has no weights of step {step}; it has {', '.join(map(str, sorted(steps)))}")
    step = max(steps) if step is None else step
    path = steps[step]
    meta = _read_meta(path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json"))
    return NanochatCheckpoint(path, step, meta, _read_weights(path))


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"{folder} can't be read: {error.strerror}") from None


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing; the model's sizes and flags are in it") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} can't be read: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise ConversionError(f"{path} has no model_config, which holds the model's sizes and flags")
    return meta


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {named[1]}" if named else "it can't be unpickled"
        raise ConversionError(f"{path} holds more than tensors, or is damaged, and was not loaded: {reason}") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # not a zip archive, cut off, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{path} is damaged, or was not saved by nanochat: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ConversionError(f"{path} is not a model's state dict")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}  # of a compiled model


def recipe_of(found: NanochatCheckpoint) -> Recipe:
    """Our recipe for the reference's run. Raises ConversionError for what ours lacks, by the reference's name."""
    config = found.meta["model_config"]
    user = found.meta.get("user_config")
    user = user if isinstance(user, dict) else {}
    if missing := _SIZES.keys() - config.keys():
        raise ConversionError(f"{found.path.name}: its metadata's model_config lacks {', '.join(sorted(missing))}")
    length, batch = config["sequence_len"], found.meta.get("total_batch_size")
    train: dict[str, Any] = {
        # The file doesn't say how long the run was to be.
        "steps": max(found.step, user.get("num_iterations") or 0, 1),
        "precision": "bf16" if _dtype(found, "transformer.wte.weight") == torch.bfloat16 else "fp32",
    }
    if isinstance(batch, int) and isinstance(length, int) and length > 0 and batch > 0 and batch % length == 0:
        train["global_batch_size"] = batch // length
    optimizer = {ours: user[theirs] for theirs, ours in _RATES.items() if isinstance(user.get(theirs), (int, float))}
    if "embedding_lr" in optimizer:
        optimizer["table_lr"] = optimizer["embedding_lr"] / 2
    if "coefficient_lr" in optimizer:
        optimizer["projection_coefficient_lr"] = optimizer["coefficient_lr"] / 100
    values = {
        "name": "nanochat",
        "model": {
            **{ours: config[theirs] for theirs, ours in _SIZES.items()},
            "window_pattern": str(config.get("window_pattern", "L")).upper(),  # older ones had no windows
            "value": _value(found.meta.get("model_type"), config),
        },
        "train": train,
        "optimizer": optimizer,
    }
    try:
        return recipe_from_dict(values)
    except RecipeError as error:
        raise ConversionError(f"the metadata of {found.path} makes no model of ours: {error}") from None


def _dtype(found: NanochatCheckpoint, name: str) -> torch.dtype | None:
    return found.weights[name].dtype if name in found.weights else None


def _value(model_type: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The section `model.value`. Raises ConversionError for a flag or model that we have nothing for."""
    flags = {**_default_flags(model_type), **{key: value for key, value in config.items() if key not in _SIZES}}
    flags.pop("window_pattern", None)
    on = [name for name, value in flags.items() if value]
    known = {*SOURCES, *TARGETS, LEARNED, SHARED}
    if lacking := [name for name in on if name not in known]:
        raise ConversionError(f"the checkpoint's model has {', '.join(lacking)}, which this project's models lack")
    sources = [name for name in on if name in SOURCES]
    if len(sources) > 1:
        raise ConversionError(f"the checkpoint's model has several value sources at once: {', '.join(sources)}")
    if not sources:
        return {"source": "projection"}
    return {
        "source": SOURCES[sources[0]],
        "target_layers": next((ours for theirs, ours in TARGETS.items() if theirs in on), "last_third"),
        "coefficient": "learned" if LEARNED in on or SOURCES[sources[0]] in _NEVER_FIXED else "fixed",
        "table": "shared" if SHARED in on else "per_layer",
    }


def _default_flags(model_type: Any) -> dict[str, bool]:
    """Flags that a variant's name sets. Raises ConversionError for another model, or a variant that we lack."""
    if model_type is None or model_type == FAMILY:  # None: before there were variants; its tensors will tell
        return {}
    source, flags = str(model_type).removeprefix(f"{FAMILY}_"), {}
    for suffix, flag in _SUFFIXES.items():
        if source.endswith(suffix) and source not in SOURCES:
            source, flags[flag] = source.removesuffix(suffix), True
    if not str(model_type).startswith(f"{FAMILY}_") or source not in SOURCES:
        raise ConversionError(
            f"the checkpoint's model_type is {model_type!r}, which this project has no model for; it has {FAMILY} and "
            f"its variants {', '.join(f'{FAMILY}_{name}' for name in SOURCES)}"
        )
    return {**flags, source: True}


class _Weights:
    """The reference's tensors by our canonical names, whole and without padding. Raises ConversionError for a tensor
    that is missing, unknown or of another shape."""

    def __init__(self, weights: dict[str, Tensor], model: ModelConfig, path: Path):
        self._path = path
        self._specs = {spec.name: spec for spec in parameter_specs(model)}
        self._names = {name: reference_name(spec, model) for name, spec in self._specs.items()}
        unused = {f"transformer.h.{i}.attn.c_v.weight" for i in range(model.num_layers)}
        # A shared table is stored under the number of every layer that reads it.
        shared = [f"value_embeds.{i}.weight" for i in model.layers_from_source() if model.value.table == "shared"]
        problems = [f"{name} is missing" for name in sorted(set(self._names.values()) - weights.keys())]
        problems += [
            f"{name} is unknown" for name in sorted(weights.keys() - {*self._names.values(), *unused, *shared})
        ]
        for name, spec in self._specs.items():
            if (theirs := self._names[name]) in weights:
                problems += _misfit(theirs, weights[theirs], spec)
        copies = [name for name in shared if name in weights]
        if any(not torch.equal(self._read(copy), self._read(copies[0])) for copy in copies[1:]):
            problems.append("its shared table differs between layers")
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ConversionError(f"{path} doesn't fit its metadata: {'; '.join(problems[:8])}{more}")

    def __call__(self, name: str) -> Tensor:
        return self._read(self._names[name])[: self._specs[name].shape[0]].float()

    def _read(self, theirs: str) -> Tensor:
        """Maps the file anew, so that its pages leave memory with the tensor."""
        return _read_weights(self._path)[theirs]


def reference_name(spec: ParameterSpec, model: ModelConfig) -> str:
    """The reference's name of one of our parameters."""
    if spec.kind == "table":
        return f"value_embeds.{spec.layer if spec.layer is not None else model.layers_from_source()[0]}.weight"
    if spec.layer is None:
        return _NAMES[spec.name]
    name = spec.name.removeprefix(f"model.layers.{spec.layer}.")
    if name == "self_attn.source_coefficient":
        theirs = "attn.beta_v" if model.value.facts.coefficients == 2 else "attn.gamma_v"
    else:
        theirs = _NAMES[name]
    return f"transformer.h.{spec.layer}.{theirs}"


def _misfit(name: str, tensor: Tensor, spec: ParameterSpec) -> list[str]:
    rows = spec.shape[0]
    padded = -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if spec.kind in VOCABULARY_KINDS else rows
    if tuple(tensor.shape) not in (spec.shape, (padded, *spec.shape[1:])):
        return [f"{name} is {list(tensor.shape)}, expected {[padded, *spec.shape[1:]]}"]
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return [f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, expected a floating-point type"]
    return []


def _tokenizer_writer(folder: Path, vocab_size: int) -> Callable[[Path], object]:
    """A function that writes the tokenizer for a run into a folder."""
    write: Callable[[Path], object]
    if (folder / TOKENIZER_FILE).is_file():
        encoding = read_encoding(folder / TOKENIZER_FILE)
        ids, write = encoding.vocab_size, functools.partial(write_tokenizer, encoding)
    elif (folder / "tokenizer.json").is_file():
        encoder = load_encoder(folder)
        ids, write = encoder.vocab_size, functools.partial(copy_tokenizer, encoder)
    else:
        raise ConversionError(f"--tokenizer {folder}: it has neither {TOKENIZER_FILE} nor a tokenizer.json")
    if ids != vocab_size:
        raise ConversionError(
            f"--tokenizer {folder}: it has {ids} ids, but the checkpoint's model_config.vocab_size is {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    return write
