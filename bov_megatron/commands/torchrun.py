"""Train or evaluate on several ranks of this machine: torchrun with the run's own exit status, and without tracebacks
of its own.

    bov torchrun --nproc-per-node 8 recipes/780m_bov.yaml data.path=DATA
    bov torchrun --nproc-per-node 8 evaluate runs/780m_bov --core BUNDLE --json core.json

What stands before the recipe, or before `evaluate`, are torchrun's options; `--help` lists them. On several machines,
start it on each.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import bov_megatron
from bov_megatron import errors


def main(arguments: list[str] | None = None) -> int:
    """Returns the run's exit status: see bov_megatron.errors."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = run.get_args_parser()
    parser.prog = "bov torchrun"
    options = parser.parse_args(arguments)
    options.module = True
    if options.training_script == "evaluate":
        options.training_script = "bov_megatron.commands.evaluate"
    else:
        options.training_script_args = [options.training_script, *options.training_script_args]
        options.training_script = "bov_megatron.train"
    # For a checkout that is not the current folder.
    here = str(Path(bov_megatron.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    if options.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun takes too, with five lines of warning
    _silence()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("BOV_STATUS_FILE", f"{folder}/status")
        try:
            run.run(options)
            return errors.DONE
        except ChildFailedError as failure:
            return _reported() or max(failure.get_first_failure()[1].exitcode, errors.CRASHED)
        except SignalException:
            return _reported() or errors.INTERRUPTED


def _reported() -> int | None:
    """The status that rank 0 has reported; None on another machine, or after a crash."""
    try:
        return int(Path(os.environ["BOV_STATUS_FILE"]).read_text())
    except (OSError, ValueError):
        return None


def _silence() -> None:
    """The ranks say why they end; torchrun would add a page to each of them."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
