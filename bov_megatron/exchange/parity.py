"""Comparing the logits of two models that should be the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    found, expected = found.double(), expected.double()
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return Parity(
        relative_error=((found - expected).norm() / expected.norm()).item(),
        largest_difference=(found - expected).abs().max().item(),
        top1_agreement=(found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
    )
