"""Context parallelism: splitting a sequence over ranks, and gathering it for attention.

The sequence is cut into 2C equal chunks, and rank r of C holds chunks r and 2C-1-r ("zigzag"). A late chunk, whose
queries see many keys, goes with an early one, so that causal attention is the same work on every rank. Every rank
loads whole samples, so ids and labels are sliced without communication.

Shapes: S sequence, C context-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def stretches(length: int, rank: int, size: int, first: int = 0) -> list[tuple[int, int]]:
    """Positions from `first` on that a rank holds, as ranges `[start, stop)` in order.

    Raises ValueError where their number is not a multiple of 2C.
    """
    if size == 1:
        return [(first, length)]
    if (length - first) % (2 * size):
        raise ValueError(
            f"a sequence of {length - first} tokens does not divide into the {2 * size} equal chunks of {size} "
            "context-parallel ranks; pad it, or use a model.sequence_length that does"
        )
    chunk = (length - first) // (2 * size)
    return [(first + n * chunk, first + (n + 1) * chunk) for n in (rank, 2 * size - 1 - rank)]


def take(whole: Tensor, dim: int, group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """This rank's part, from position `first` on, of a tensor with the whole sequence along `dim`."""
    parts = [whole.narrow(dim, a, b - a) for a, b in stretches(whole.size(dim), group.rank(), group.size(), first)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def positions(length: int, group: dist.ProcessGroup, device, first: int = 0) -> Tensor:
    """This rank's positions in the whole sequence, those from `first` on, `[(S - first)/C]`."""
    return take(torch.arange(length, device=device), 0, group, first)


def gather_sequence(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence from each rank's part: `[S/C, …]` -> `[S, …]`.

    An all-gather; a reduce-scatter backward, because queries of all ranks contribute to the gradient.
    """
    return _GatherSequence.apply(part, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, group):
        ctx.group, size = group, group.size()
        by_rank = part.new_empty(size * part.size(0), *part.shape[1:])
        dist.all_gather_into_tensor(by_rank, part.contiguous(), group=group)
        early, late = by_rank.unflatten(0, (size, 2, -1)).unbind(1)
        return torch.cat((early, late.flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        size = ctx.group.size()
        early, late = grad.unflatten(0, (2, size, -1))
        by_rank = torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)
        own = by_rank.new_empty(by_rank.size(0) // size, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None
