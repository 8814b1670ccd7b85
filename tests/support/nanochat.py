"""Checkpoint directories and tokenizers as the paper's reference implementation (a fork of nanochat) writes them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.support.golden_files import GOLDEN_DIR

FLAGS = (
    *("add_init_res", "add_init_pre_norm_attn_only", "add_init_pre_norm_mlp_only", "add_init_v", "add_init_res_v"),
    *("detach_init_value", "add_init_qkv", "add_init_qkv_shared", "v_from_x0", "v_exclude_self", "v_scale_learn"),
    *("v_from_v1", "add_init_proj", "on_every_layer", "on_second_half_layers", "on_last_two_thirds_layers"),
    *("on_every_two_layers", "add_init_value_emb_nanogpt", "add_init_value_emb", "value_emb_shared"),
    *("v_from_value_emb", "learn_init_coeffs", "learn_init_scaling_vec"),
)
"""Fields of the reference's configuration besides sizes; all are written, as `dataclasses.asdict` does."""
GOLDEN_FLAGS = {
    "baseline": [],
    "bov": ["v_from_value_emb", "learn_init_coeffs"],
    "bov_fixed": ["v_from_value_emb"],
    "bov_shared": ["v_from_value_emb", "learn_init_coeffs", "value_emb_shared"],
    "bov_every_layer": ["v_from_value_emb", "learn_init_coeffs", "on_every_layer"],
    "x0_wv": ["v_from_x0", "learn_init_coeffs"],
    "v1": ["v_from_v1", "learn_init_coeffs"],
    "ve_add_every2": ["add_init_value_emb_nanogpt", "on_every_two_layers"],
}
SPECIAL_TOKENS = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, torch.Tensor], sizes: dict[str, Any], flags: Iterable[str], **meta: Any
) -> Path:
    """Write `model_<step>.pt` and `meta_<step>.json`, and optimizer state, which nobody should read.

    Args:
        weights: by the reference's names, without padding of the vocabulary.
        sizes: `n_layer`, … of the configuration.
        flags: those that are set.
        meta: entries of the metadata to replace; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(padded(weights), folder / f"model_{step:06d}.pt")
    (folder / f"optim_{step:06d}_rank0.pt").write_bytes(b"not read")
    config = {**sizes, **{flag: flag in flags for flag in FLAGS}}
    content = {
        "step": step,
        "val_bpb": 1.25,
        "model_type": "gpt_base",
        "model_config": config,
        "user_config": {"run": "dummy", "num_iterations": -1, "matrix_lr": 0.01, "embedding_lr": 0.2, "scalar_lr": 0.4},
        "device_batch_size": 1,
        "max_seq_len": sizes["sequence_len"],
        "total_batch_size": 4 * sizes["sequence_len"],
        "dataloader_state_dict": {"pq_idx": 3, "rg_idx": 17, "epoch": 1},
        "loop_state": {"min_val_bpb": 1.25, "smooth_train_loss": 3.5, "total_training_time": 60.0},
        **meta,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(content, indent=2))
    return folder


def padded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the vocabulary's rows padded to a multiple of 64, by rows that no forward pass shows."""
    result = {}
    for name, tensor in weights.items():
        if name.startswith(("transformer.wte", "lm_head", "value_embeds")):
            tensor = torch.cat([tensor, torch.full((-len(tensor) % 64, tensor.size(1)), 7.0, dtype=tensor.dtype)])
        result[name] = tensor
    return result


def golden_weights(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of a golden file by the reference's names, and the sizes of its configuration."""
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
        keys = [key for key in file.keys() if key.startswith("weight.")]  # noqa: SIM118 (not a mapping)
        weights = {key.removeprefix("weight."): file.get_tensor(key) for key in keys}
    if GOLDEN_FLAGS[name].count("value_emb_shared"):  # the file has the shared table once, a state dict per layer
        weights["value_embeds.5.weight"] = weights["value_embeds.4.weight"]
    sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    return weights, {size: meta[size] for size in sizes}


def save_golden_checkpoint(folder: Path, name: str, step: int = 40, **meta: Any) -> Path:
    """A golden file's model as a checkpoint directory."""
    weights, sizes = golden_weights(name)
    return save_checkpoint(folder, step, weights, sizes, GOLDEN_FLAGS[name], **meta)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A tiktoken Encoding, trained by rustbpe."""
    import rustbpe
    import tiktoken

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=trainer.get_pattern(), mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(folder: Path, encoding: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.pkl").open("wb") as file:
        pickle.dump(encoding, file)
    return folder


class Calls:
    """Pickles to a call, as a harmful file would."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
