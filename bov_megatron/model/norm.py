"""RMSNorm without a learned weight, the model's only normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """`x` divided by its root mean square over the last dimension; eps is the dtype's machine epsilon."""
    return F.rms_norm(x, (x.size(-1),))


class WeightlessRMSNorm(torch.nn.Module):
    """`rms_norm` as a Megatron layer norm. It has no parameters, so there are no gradients to reduce under sequence
    parallelism."""

    def __init__(self, config=None, hidden_size: int | None = None, eps: float | None = None):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)
