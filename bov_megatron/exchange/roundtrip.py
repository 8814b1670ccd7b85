"""A run's checkpoint to Hugging Face and back, every weight compared bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bov_megatron.errors import ConversionError
from bov_megatron.exchange.convert import model_of, stored_tensors, to_hf
from bov_megatron.exchange.export import DEFAULT_SHARD_BYTES
from bov_megatron.exchange.from_hf import ExportedWeights, from_hf
from bov_megatron.exchange.needs import Needs, needs_of_roundtrip
from bov_megatron.exchange.parity import Parity
from bov_megatron.lifecycle import run_folder


@dataclass(frozen=True)
class Roundtrip:
    checkpoint: Path
    step: int
    parity: Parity | None
    tensors: int
    elements: int


def roundtrip(
    run_dir: Path,
    *,
    step: int | None = None,
    check_parity: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Roundtrip:
    """Export a checkpoint in fp32, make a run of the export, and compare both with the export; nothing is kept.

    Needs room for both in the folder for temporary files (TMPDIR). Arguments are those of `to_hf`. Raises
    ConversionError where a bit differs.
    """
    with tempfile.TemporaryDirectory(prefix="roundtrip-") as folder:
        done = to_hf(
            run_dir,
            Path(folder) / "export",
            step=step,
            dtype=torch.float32,
            check_parity=check_parity,
            max_shard_bytes=max_shard_bytes,
        )
        back = from_hf(done.out_dir, Path(folder) / "run")
        exported = ExportedWeights(done.out_dir)
        tensors, elements = _compare(done.checkpoint, exported)
        _compare(back.checkpoint, exported)
    return Roundtrip(done.checkpoint, done.step, done.parity, tensors, elements)


def plan_roundtrip(run_dir: Path, *, step: int | None = None) -> Needs:
    """What `roundtrip` needs. Raises CheckpointError."""
    path = run_folder.find_checkpoint(run_dir, step)
    return needs_of_roundtrip(model_of(path), DEFAULT_SHARD_BYTES)


def _compare(checkpoint: Path, exported: ExportedWeights) -> tuple[int, int]:
    """Numbers of tensors and elements compared."""
    different, tensors, elements = [], 0, 0
    for name, tensor in stored_tensors(checkpoint):
        # As integers: 0 and -0 are equal numbers, and a nan differs from itself.
        ours, theirs = (t.contiguous().view(torch.int32) for t in (tensor, exported(name)))
        different += [] if torch.equal(ours, theirs) else [name]
        tensors, elements = tensors + 1, elements + tensor.numel()
    if different:
        raise ConversionError(f"{checkpoint} and its export differ in {len(different)} tensors: {', '.join(different)}")
    return tensors, elements
