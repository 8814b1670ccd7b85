"""RMSNorm without a learned weight, the model's only normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_megatron.parallel.regions import region


def rms_norm(x: Tensor) -> Tensor:
    """`x` divided by its root mean square over the last dimension; eps is the dtype's machine epsilon."""
    return F.rms_norm(x, (x.size(-1),))


normalise = region(rms_norm)


@region
def add_and_normalise(residual: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with a block's output, and its `rms_norm`."""
    total = residual + output
    return total, rms_norm(total)


class WeightlessRMSNorm(torch.nn.Module):
    """`rms_norm` as a Megatron layer norm. It has no parameters, so there are no gradients to reduce under sequence
    parallelism."""

    def __init__(self, config=None, hidden_size: int | None = None, eps: float | None = None):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x)
