"""Whether there is a GPU, and which: one module asks, the others ask it."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bov_megatron
from bov_megatron.errors import LaunchError
from bov_megatron.parallel.device import backend, bind_to_cpus_near_gpu, device, has_gpu, select_gpu, to_device

PACKAGE = Path(bov_megatron.__file__).parent
QUESTIONS = {"is_available", "device_count", "current_device", "get_device_name", "set_device"}


def test_only_one_module_asks_for_the_gpu():
    asking = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "parallel/device.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in QUESTIONS
        and "cuda" in ast.unparse(node.func)
    }
    assert not asking, "ask bov_megatron.parallel.device instead"


def test_tensors_live_where_the_device_is():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert device().type == where
    assert to_device(torch.zeros(2)).device == device()
    assert has_gpu() == (backend() == "nccl") == (where == "cuda")


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    """Two ranks on one GPU would end in NCCL's error, or train at half the speed."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("BOV_NUMA_BINDING", "0")
    select_gpu(3)
    with pytest.raises(LaunchError, match="local rank 4 has no GPU: this node shows 4; start as many ranks"):
        select_gpu(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    select_gpu(5)  # Slurm shows each task its own
    assert chosen == [3, 0]


@pytest.mark.parametrize(
    "mask, expected",
    [
        ("{first:x}", "the first"),
        ("ffffffff,ffffffff,ffffffff,ffffffff", "all"),
        ("80000000,00000000,00000000,00000000,00000000", "all"),  # near are only CPUs that this process may not use
        (None, "all"),
    ],
)
def test_a_rank_runs_on_the_cpus_near_its_gpu(tmp_path, monkeypatch, mask, expected):
    allowed = os.sched_getaffinity(0)
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: place}.get)
    if mask:
        folder = tmp_path / "0000:1b:00.0"
        folder.mkdir()
        (folder / "local_cpus").write_text(mask.format(first=1 << min(allowed)) + "\n")
    try:
        bind_to_cpus_near_gpu(tmp_path)
        assert os.sched_getaffinity(0) == ({min(allowed)} if expected == "the first" else allowed)
    finally:
        os.sched_setaffinity(0, allowed)
