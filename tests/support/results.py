"""What runs leave, watched and compared bit for bit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bov_megatron.lifecycle.run_folder import latest_checkpoint
from tests.support.runs import steps


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by name: weights and optimizer state."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no process group: that is meant
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def same_as(undisturbed: Path, run_dir: Path) -> str:
    """Assert that metrics (losses, digests, validation, …) and all tensors of the last checkpoint are those of the
    undisturbed run; what was compared, in words."""
    lines, expected = steps(run_dir), steps(undisturbed)
    assert lines == expected
    ours, theirs = latest_checkpoint(run_dir), latest_checkpoint(undisturbed)
    assert ours.name == theirs.name
    found, wanted = tensors(ours), tensors(theirs)
    assert found.keys() == wanted.keys() and any("exp_avg_sq" in name for name in found), found.keys()
    different = [name for name in found if not torch.equal(found[name].view(-1), wanted[name].view(-1))]
    assert not different, different
    return f"{len(lines)} lines of metrics and {len(found)} tensors of {ours.name} equal the undisturbed run's"


def lines_of(run_dir: Path) -> int:
    """Lines of metrics so far: steps done."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition: Callable, what: str, log: Callable[[], str] = lambda: "", seconds: float = 240) -> None:
    """Fails, with the log, where `condition` is not met in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s\n{log()}"
        time.sleep(0.002)
