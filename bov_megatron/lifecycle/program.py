"""A command as a process of its own."""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from bov_megatron import errors
from bov_megatron.lifecycle.interruption import CtrlC
from bov_megatron.lifecycle.signals import Listener, end


def run_program(command: Callable[[], int], signals: Listener) -> NoReturn:
    """Run `command` and end the process with the exit status it returns. `signals` are heard from now to the end."""
    # The first to be registered is the last exit hook to run. After it, Python would answer Ctrl-C with a traceback,
    # and there is nothing left to end.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        signals.listen()
        status = command()
        signals.leave_with(status)
    except SystemExit as refused:  # argparse's own
        status = refused.code if isinstance(refused.code, int) else int(refused.code is not None)
        signals.leave_with(status)
    except BaseException:
        # Libraries make other exceptions of a KeyboardInterrupt, most of all while they are being imported.
        _end_if_interrupted(signals)
        signals.leave_with(errors.CRASHED)
        raise
    _end_if_interrupted(signals)  # a library may have swallowed it
    sys.exit(status)


def _end_if_interrupted(signals: Listener) -> None:
    # Without exit hooks: they would wait for threads and processes that are still at work.
    if isinstance(signals, CtrlC) and signals.interrupted:
        signals.say()  # the listening thread may not have come to it
        end(errors.CTRL_C)
