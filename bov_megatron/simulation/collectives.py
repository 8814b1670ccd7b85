"""What a rank sends and receives: every collective that torch.distributed is asked for, with its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bov_megatron.parallel import process_groups


@contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[dist.ProcessGroup]:
    """The group of all ranks, of which this process is one and the others don't exist; nothing is sent. Inside, further
    groups may be made by `process_groups.initialize`."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dist.distributed_c10d._get_default_group()
    finally:
        process_groups.shutdown()


@dataclass(frozen=True)
class Collective:
    """One collective, or one message of a pipeline, in bytes of this rank."""

    kind: str
    """`all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast`, `send` or `recv`."""
    group: tuple[int, ...]
    """Global ranks."""
    sent: int
    received: int
    """From other ranks; an all-reduce as a reduce-scatter and an all-gather, as rings do it."""
    buffer: int
    """What it is received into."""

    @property
    def bytes(self) -> int:
        """What passes through this rank's link in the busier direction."""
        return max(self.sent, self.received)


class Traffic(TorchDispatchMode):
    """Records the collectives that this rank calls, and counts copies. Collectives of fake tensors do nothing."""

    def __init__(self):
        super().__init__()
        self.messages: list[Collective] = []
        self.copies = 0

    @property
    def received(self) -> int:
        return sum(message.received for message in self.messages)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            return self.communicate(function, args, kwargs or {})
        self.copies += function.overloadpacket.__name__ == "copy_"
        return function(*args, **(kwargs or {}))

    def communicate(self, function, args: tuple, kwargs: dict) -> Any:
        """Record one of c10d's operators and run it, unless its tensors are fake."""
        name = function.overloadpacket.__name__
        if name != "barrier":
            self.messages.append(_collective(name, args))
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args)):
            return function(*args, **kwargs)
        work = FakeWork().boxed()  # there is no kernel for some of these operators on fake tensors
        return work if len(function._schema.returns) == 1 else (args[0], work)


def _collective(name: str, args: tuple) -> Collective:
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    ranks, rank = group.size(), group.rank()
    out, source = _bytes(args[0]), _bytes(args[1]) if isinstance(args[1], (Tensor, list)) else 0

    def found(kind: str, sent: int, received: int, buffer: int = out) -> Collective:
        return Collective(kind, tuple(dist.get_process_group_ranks(group)), sent, received, buffer)

    if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "allgather_coalesced_"):
        return found("all_gather", source, out - source)
    if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
        return found("reduce_scatter", source - out, source - out, source)
    if name in ("allreduce_", "allreduce_coalesced_"):
        moved = 2 * out * (ranks - 1) // ranks
        return found("all_reduce", moved, moved)
    if name == "alltoall_base_":
        own_received, own_sent = (
            tensor[:1].nbytes * rows[rank] if rows else tensor.nbytes // ranks
            for tensor, rows in zip(args[:2], args[3:5], strict=True)
        )
        return found("all_to_all", source - own_sent, out - own_received)
    if name == "broadcast_":
        is_root = args[2] == rank
        return found("broadcast", out if is_root else 0, 0 if is_root else out)
    if name == "send":
        return found("send", out, 0, 0)
    if name == "recv_":
        return found("recv", 0, out)
    raise NotImplementedError(f"count the bytes of c10d.{name}")


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in([values]))
