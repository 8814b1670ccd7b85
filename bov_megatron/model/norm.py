"""The model's one normalisation: RMSNorm without a learned weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """`x` divided by its root mean square over the last dimension; eps is the dtype's machine epsilon."""
    return F.rms_norm(x, (x.size(-1),))


class WeightlessRMSNorm(torch.nn.Module):
    """`rms_norm` in the place of a Megatron layer norm. Holds no parameter, so it needs no gradient
    reduction under sequence parallelism."""

    def __init__(self, config=None, hidden_size: int | None = None, eps: float | None = None):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)
