"""Worlds of any size, in which this process is one rank, nothing is sent and tensors have no memory; and a count of
what is sent in real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import Recipe


def fake_parameters(recipe: Recipe) -> list[LocalParameter]:
    """The parameters of the recipe's model on one rank of its tensor-parallel group, without memory. Enter
    `FakeTensorMode` first."""
    from bov_megatron.model.decoder import BovModel
    from bov_megatron.parallel import process_groups

    ranks = recipe.parallel.tensor_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    process_groups.initialize(recipe, 0, ranks)
    model = BovModel(recipe, pre_process=True, post_process=True)
    process_groups.shutdown()
    return model.local_parameters


@contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[dist.ProcessGroup]:
    """The group of all ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@dataclass
class Message:
    """One collective, in bytes of this rank."""

    kind: str
    sent: int
    received: int
    """From other ranks."""
    buffer: int
    """What it is received into."""


class Traffic(TorchDispatchMode):
    """Records the collectives that this rank calls, and counts copies."""

    def __init__(self):
        super().__init__()
        self.messages: list[Message] = []
        self.copies = 0

    @property
    def received(self) -> int:
        return sum(message.received for message in self.messages)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else str(function)
        self.copies += name == "copy_"
        if function.namespace == "c10d":
            self.messages.append(self._message(name, args))
        return function(*args, **(kwargs or {}))

    def _message(self, name: str, args: tuple) -> Message:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        output, input = args[0], args[1]
        if name == "_allgather_base_":
            assert output.numel() == ranks * input.numel()
            return Message("all_gather", input.nbytes, output.nbytes - input.nbytes, output.nbytes)
        if name == "alltoall_base_":
            received, sent = args[3], args[4]
            assert (sum(received), sum(sent)) == (output.numel(), input.numel())
            size = output.element_size()
            others = output.numel() - received[rank]
            return Message("all_to_all", size * (input.numel() - sent[rank]), size * others, output.nbytes)
        if name == "reduce_scatter_tensor_coalesced_":
            parts, whole = sum(part.nbytes for part in output), sum(part.nbytes for part in input)
            return Message("reduce_scatter", whole - parts, whole - parts, whole)
        if name == "allreduce_":  # as a reduce-scatter and an all-gather
            size = sum(part.nbytes for part in output)
            return Message("all_reduce", 2 * size * (ranks - 1) // ranks, 2 * size * (ranks - 1) // ranks, size)
        raise NotImplementedError(f"count the bytes of c10d.{name}")
