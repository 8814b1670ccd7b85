"""Running a benchmark on several ranks of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import torch

from benchmarks.training_step import free_port
from bov_megatron.parallel import process_groups
from bov_megatron.recipe import Recipe


def on_ranks(function: Callable[..., dict], recipe: Recipe, threads: int, *arguments) -> list[dict]:
    """Call `function(recipe, *arguments)` on each rank of the recipe's tensor-parallel group, in new processes.

    Uses a GPU per rank if there are as many, else CPU tensors and gloo.

    Args:
        function: importable, from a module that imports Megatron, so that the ranks are forked with it imported.
        threads: torch's, over all ranks.

    Returns the results by rank, as plain JSON values. Raises RuntimeError if a rank fails.
    """
    size = recipe.parallel.tensor_model_parallel_size
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    _start_forkserver()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        fixed = (function, recipe, free_port(), max(threads // size, 1), folder, arguments)
        ranks = [context.Process(target=_rank, args=(rank, size, *fixed), daemon=True) for rank in range(size)]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
        finally:
            for process in ranks:
                if process.pid:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"the benchmark's ranks ended with exit codes {codes}; their errors are above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def _start_forkserver() -> None:
    """Deaf to Ctrl-C, as are the ranks then: a terminal sends it to them too, and their parent ends them."""
    resource_tracker.ensure_running()  # before, as its start lets the signal through again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the new process inherits it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _end_with_parent() -> None:
    """Interrupted while it starts a rank, the parent doesn't know of it yet, and can't end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _rank(
    rank: int, size: int, function: Callable[..., dict], recipe: Recipe, port: int, threads: int, folder: str, arguments
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda.device_count() < size:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NCCL doesn't allow two ranks on one GPU
    torch.set_num_threads(threads)
    process_groups.initialize(recipe, rank, size, local_rank=rank, init_method=f"tcp://127.0.0.1:{port}")
    try:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(function(recipe, *arguments)))
    finally:
        process_groups.shutdown()
