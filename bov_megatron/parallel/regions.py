"""Parts of a step that `train.compile` compiles, one function each.

A region is a function of tensors alone. Communication, table lookups and their tickets stay outside: a compiler would
have to know in which order ranks communicate, and a ticket's storage identifies it. All layers share a region, so it
is compiled once per set of shapes, with and without gradients.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch._inductor.config

from bov_megatron.errors import RecipeError
from bov_megatron.parallel.device import has_gpu

BACKEND = os.environ.get("BOV_COMPILE_BACKEND", "inductor")
"""torch.compile's. `aot_eager` compiles in a fraction of the time and runs no faster than uncompiled."""
VARIANTS = 32
"""Sets of shapes that one region is compiled for before torch gives up with an error."""

# Global because torch's compiler is: one setting serves all modules of this process, from `enable` on.
_enabled = False
_stand_in: Callable[..., Any] | None = None

Function = TypeVar("Function", bound=Callable[..., Any])


def enable(compile: bool | None) -> None:
    """Compile regions from now on, or don't; None compiles on a GPU, and where BOV_COMPILE_BACKEND is set. Raises
    RecipeError without a compiler."""
    global _enabled
    _enabled = (has_gpu() or "BOV_COMPILE_BACKEND" in os.environ) if compile is None else compile
    if not has_gpu():
        # Functions that Megatron compiles by itself would take minutes on a CPU without any gain.
        torch._dynamo.config.disable = not _enabled
    if not _enabled:
        return
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang"))):
        raise RecipeError(
            f"train.compile={'null' if compile is None else 'true'}: compiling needs a C++ compiler, and there is no "
            "g++, gcc or clang in PATH (nor CXX); install one, or set train.compile=false"
        )
    torch._dynamo.config.recompile_limit = VARIANTS
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Torch's default is a process for each core, up to 32, and that for each rank.
        torch._inductor.config.compile_threads = 4 if has_gpu() else 1


def region(function: Function) -> Function:
    """Decorator: run `function` compiled, as a single graph, where regions are enabled."""
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND))

    @functools.wraps(function)
    def run(*arguments, **options):
        if _stand_in is not None:
            return _stand_in(function, *arguments, **options)
        return compiled()(*arguments, **options) if _enabled else function(*arguments, **options)

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager for inputs of many shapes, each of which would be compiled anew."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def replaced_by(stand_in: Callable[..., Any]) -> Iterator[None]:
    """Context manager: call `stand_in(function, *arguments)` for every region."""
    global _stand_in
    before, _stand_in = _stand_in, stand_in
    try:
        yield
    finally:
        _stand_in = before
