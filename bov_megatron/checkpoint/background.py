"""Writing a share while training continues, in a process forked for each save.

Forking copies the state: the child sees host memory as it was at the fork, whatever training changes later (the kernel
copies pages on write). A process kept for all saves would need the tensors sent to it each time.

The child doesn't communicate with other ranks or use a device. It must not outlive its parent, because the sockets it
inherits would hide from other ranks that this one was killed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import sys
import traceback

import torch
import torch.distributed as dist

from bov_megatron.checkpoint.writing import Share, Written, write_share

_PR_SET_PDEATHSIG = 1
_MEANT_FOR_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class BackgroundWriter:
    """Runs `write_share(share)` in a child process (Linux only). Call `result` once."""

    def __init__(self, share: Share):
        _own_copies(share)
        library, parent = ctypes.CDLL(None), os.getpid()  # before the fork: loading takes locks
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reading)
                library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    _write_and_tell(share, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        self.pipe = os.fdopen(reading, "rb")
        share.buckets = []  # the child has them

    def done(self) -> bool:
        """Whether `result` returns without waiting."""
        return bool(select.select([self.pipe], [], [], 0)[0])

    def result(self) -> Written:
        """Wait for the child; if it died, the outcome is an error."""
        with self.pipe:
            answer = self.pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return pickle.loads(answer)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return Written(error=f"rank {dist.get_rank()} ({socket.gethostname()}): its writing process {how}")


def _own_copies(share: Share) -> None:
    """Clone tensors in shared or pinned memory, which fork doesn't copy."""
    for index, (path, key, (byte_items, tensor_items)) in enumerate(share.buckets):
        own = [(item, t.clone() if t.is_shared() or t.is_pinned() else t) for item, t in tensor_items]
        share.buckets[index] = (path, key, (byte_items, own))


def _write_and_tell(share: Share, pipe: int) -> None:
    """Body of the child process."""
    for number in _MEANT_FOR_THE_PARENT:  # schedulers signal every process of a job
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # don't finalize the parent's objects, e.g. on a device
    torch.set_num_threads(1)  # fork doesn't copy the parent's threads
    written = write_share(share)
    with os.fdopen(pipe, "wb") as stream:
        pickle.dump(written, stream)
    os._exit(0)
