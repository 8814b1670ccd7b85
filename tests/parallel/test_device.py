"""Whether there is a GPU, and which: one module asks, the others ask it."""

import ast
from pathlib import Path

import torch

import bov_megatron
from bov_megatron.parallel.device import backend, device, has_gpu, to_device

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
