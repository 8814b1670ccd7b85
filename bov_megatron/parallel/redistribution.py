"""Moving the elements of a flattened tensor from the ranks that hold them to the ranks that need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

Ranges = Sequence[tuple[int, int]]
"""Per rank, its elements `[start, stop)` of a flattened tensor, ascending by rank."""


class Redistribution:
    """One all-to-all, in which ranks send each other only the elements that are needed.

    Args:
        have: elements that each rank holds.
        need: elements that each rank receives. Both ascend by rank, so that pieces received in the order of ranks are
            in order.
    """

    def __init__(self, have: Ranges, need: Ranges, group: dist.ProcessGroup | None):
        self.group = group
        rank = dist.get_rank(group)
        self.sizes_sent = [_overlap(have[rank], wanted) for wanted in need]
        self.sizes_received = [_overlap(held, need[rank]) for held in have]

    def __call__(self, mine: Tensor) -> Tensor:
        """This rank's `need[rank]`, from its `have[rank]` as a flat tensor; collective."""
        received = mine.new_empty(sum(self.sizes_received))
        dist.all_to_all_single(received, mine.contiguous(), self.sizes_received, self.sizes_sent, group=self.group)
        return received


def equal_parts(total: int, ranks: int) -> list[tuple[int, int]]:
    """Ranges of equal length in rank order; where `total` doesn't divide, the last ones are shorter or empty."""
    part = -(-total // ranks)
    bounds = [min(total, part * rank) for rank in range(ranks + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
