"""Whether there is a GPU, and which: one module asks, the others ask it."""

import ast
from pathlib import Path

import pytest
import torch

import bov_megatron
from bov_megatron.errors import LaunchError
from bov_megatron.parallel.device import backend, device, has_gpu, select_gpu, to_device

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
    select_gpu(3)
    with pytest.raises(LaunchError, match="local rank 4 has no GPU: this node shows 4; start as many ranks"):
        select_gpu(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    select_gpu(5)  # Slurm shows each task its own
    assert chosen == [3, 0]
