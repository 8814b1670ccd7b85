"""Comparing the logits of two models that should be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bov_megatron.recipe import ModelConfig

MOST_IDS = 1024
POSITIONS = 64
"""Whose logits are compared at a time."""


def number_of_ids(model: ModelConfig) -> int:
    """Whose logits are compared, in one sequence: more than a short window of them."""
    return min(model.sequence_length, MOST_IDS)


@dataclass(frozen=True)
class Parity:
    """How far logits are from those expected."""

    relative_error: float
    """Norm of the difference over the norm of what was expected."""
    largest_difference: float
    top1_agreement: float
    """Share of positions with the same most probable token."""
    kl: float
    """Kullback-Leibler divergence of the distributions from the expected ones, mean over positions, in nats."""

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest_difference:.1e}, top-1 agreement {self.top1_agreement:.2%}, KL "
            f"{self.kl:.1e} nats, relative error {self.relative_error:.1e}"
        )


def compare_logits(found: Tensor, expected: Tensor) -> Parity:
    """Compare logits `[..., vocabulary]`."""
    found, expected = found.flatten(0, -2), expected.flatten(0, -2)
    squares_of_difference = squares = kl = largest = agreeing = 0.0
    # Some positions at a time, because a large vocabulary's logits in fp64 are larger than a layer.
    for a, b in zip(found.split(POSITIONS), expected.split(POSITIONS), strict=True):
        a, b = a.double(), b.double()
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        squares_of_difference += (a - b).square().sum().item()
        squares += b.square().sum().item()
        largest = torch.tensor([largest, (a - b).abs().max()]).max().item()  # a nan stays
        agreeing += (a.argmax(-1) == b.argmax(-1)).sum().item()
        kl += (p.exp() * (p - q)).sum().item()
    positions = found.size(0)
    return Parity(
        relative_error=math.sqrt(squares_of_difference / squares),
        largest_difference=largest,
        top1_agreement=agreeing / positions,
        kl=kl / positions,
    )
