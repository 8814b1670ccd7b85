"""What sequences begin with, computed once for all of them.

Shapes: P positions of a prefix, S those that follow it, B sequences, Q prefixes, G this rank's query groups, D head
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Prefix:
    """Keys and values of prefixes of one length, by layer.

    A first forward pass, over the prefixes alone, fills it in. In those after `begin`, sequences go on where a prefix
    ends. Everything else that a token needs of those before it is in their ids.
    """

    def __init__(self) -> None:
        self.length = 0
        """P, from `begin` on. Passes compute the positions from here on."""
        self._rows_B: Tensor | None = None
        self._by_layer: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_complete(self) -> bool:
        return self._rows_B is not None

    def begin(self, length: int, rows_B: Tensor) -> None:
        """From now on, sequence b begins with prefix `rows_B[b]`."""
        self.length, self._rows_B = length, rows_B

    def joined(self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole sequences `[P + S, B, G, D]`, from those of this pass."""
        if self._rows_B is None:
            # Values may be a view of the projection's result, with query and key: kept, it would keep those too.
            self._by_layer[layer] = key_SBGD.contiguous(), value_SBGD.contiguous()
            return key_SBGD, value_SBGD
        key_PBGD, value_PBGD = (kept_PQGD[:, self._rows_B] for kept_PQGD in self._by_layer[layer])
        return torch.cat((key_PBGD, key_SBGD)), torch.cat((value_PBGD, value_SBGD))


def first_position(prefix: Prefix | None) -> int:
    """Of those that a pass computes."""
    return 0 if prefix is None else prefix.length
