"""Memory and disk that a conversion needs, known before it starts.

Memory is that of tensors: beside it, a program with torch, Megatron and transformers takes about PROGRAM.
`tests/exchange/test_memory.py` compares with what a process takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from bov_megatron.checkpoint import loading
from bov_megatron.errors import ExportError
from bov_megatron.exchange.export import stored_bytes
from bov_megatron.exchange.parity import number_of_ids
from bov_megatron.parallel.device import has_gpu, visible_gpus
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import parameter_specs

PROGRAM = 600 << 20
ALLOWANCE = 160 << 20
"""What the allocator keeps for itself, and tensors of a few KiB."""
_FP32 = 4


@dataclass(frozen=True)
class Needs:
    """All in bytes, but the number of parameters."""

    parameters: int
    memory: int
    """Most at a time, without comparing logits."""
    memory_of_parity: int | None
    """Most at a time, while logits are compared; None where they never are."""
    disk: int


def needs_of_export(model: ModelConfig, dtype: torch.dtype, tables: str | None, max_shard_bytes: int) -> Needs:
    """Of `to_hf`, whose arguments these are: tensors that were read, and those of a file of the export."""
    parameters, largest = _sizes(model)
    disk = stored_bytes(model, dtype, tables)
    read, whole = max(loading.READ_BYTES, largest), _FP32 * parameters
    file = min(max(max_shard_bytes, largest), disk)
    # A tensor is read, and then copied into the file's; so the two together are at most the model.
    memory = min(file + read, whole) + 3 * largest + ALLOWANCE
    # The checkpoint's model in fp32 with tensors that were read; or the export's, with a file of it.
    logits = 4 * _FP32 * number_of_ids(model) * model.vocab_size
    parity = whole + max(min(read, whole), file) + 3 * largest + logits + ALLOWANCE
    return Needs(parameters, memory, parity, disk)


def needs_of_run(model: ModelConfig) -> Needs:
    """Of `from_hf` and `from_nanochat`: one parameter as it is stored there, fused or padded, and as it is written."""
    parameters, largest = _sizes(model)
    return Needs(parameters, 3 * largest + ALLOWANCE, None, _FP32 * parameters)


def needs_of_roundtrip(model: ModelConfig, max_shard_bytes: int) -> Needs:
    """Of `roundtrip`: both ways, one after the other, with what the first leaves to the allocator."""
    out, back = needs_of_export(model, torch.float32, None, max_shard_bytes), needs_of_run(model)
    return Needs(out.parameters, out.memory + back.memory, out.memory_of_parity, out.disk + back.disk)


def check_memory_of_parity(needs: Needs) -> None:
    """Raise ExportError where logits can't be compared in the memory that is available."""
    needed, available = needs.memory_of_parity or 0, available_memory()
    if needed > available:
        raise ExportError(
            f"comparing logits takes about {needed / 2**30:.1f} GiB of memory for the model in fp32, and "
            f"{available / 2**30:.1f} GiB are available; give --skip-parity to convert without comparing"
        )


def available_memory() -> int:
    """Bytes for a model: of the host, or of the GPU that computes the checkpoint's logits if it has less."""
    host = psutil.virtual_memory().available
    return min(host, visible_gpus()[2]) if has_gpu() else host


def _sizes(model: ModelConfig) -> tuple[int, int]:
    """The number of parameters, and bytes in fp32 of Megatron's largest, in which query, key and value are one."""
    sizes = [spec.size for spec in parameter_specs(model)]
    fused = (model.query_dim + 2 * model.kv_dim) * model.hidden_size
    return sum(sizes), _FP32 * max(*sizes, fused)
