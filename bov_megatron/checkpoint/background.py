"""Writing a share beside training, in a process forked for this one save.

The fork is the copy: the child sees every tensor in host memory as it was at that moment, whatever training does to it
later (the kernel copies the pages that change). A process kept from save to save would have to be sent the tensors,
and is how later checkpoints come to hold the first one's weights.

The child talks to no rank, uses no device, and cannot outlive its parent: sockets that it inherits would hide a
killed rank from the others.
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
    """`write_share(share)` in a child process, from now on. Linux only.

    `done` may be asked at any time; `result` waits, and must be called once.
    """

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
        share.buckets, share.writer.write_buckets = [], None  # the child has them

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return bool(select.select([self.pipe], [], [], 0)[0])

    def result(self) -> Written:
        """What became of the share; a child that died is a share that could not be written."""
        with self.pipe:
            answer = self.pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return pickle.loads(answer)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return Written(error=f"rank {dist.get_rank()} ({socket.gethostname()}): its writing process {how}")


def _own_copies(share: Share) -> None:
    """Copy the tensors that a child would share with its parent instead of keeping them as they are."""
    for index, (path, key, (byte_items, tensor_items)) in enumerate(share.buckets):
        own = [(item, t.clone() if t.is_shared() or t.is_pinned() else t) for item, t in tensor_items]
        share.buckets[index] = (path, key, (byte_items, own))


def _write_and_tell(share: Share, pipe: int) -> None:
    """The child's whole life."""
    for number in _MEANT_FOR_THE_PARENT:  # schedulers send them to every process of a job
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # nothing of the parent's, on a device or not, is to be cleaned up here
    torch.set_num_threads(1)  # the parent's threads are not here
    written = write_share(share)
    with os.fdopen(pipe, "wb") as stream:
        pickle.dump(written, stream)
    os._exit(0)
