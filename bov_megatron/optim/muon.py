"""Muon's update of whole matrices on one rank, as functions.

Steps, in the order of the reference: Nesterov momentum, orthogonalisation by Polar Express in bf16, NorMuon variance
normalisation, cautious weight decay. Shapes: a matrix is `[R, C]` (rows = outputs, columns = inputs); M stacked ones
are `[M, R, C]`.

Sources: Muon (kellerjordan.github.io/posts/muon); Polar Express, arXiv 2505.16932; NorMuon, arXiv 2510.05491; used
together in arXiv 2606.02780. Later versions of that paper's code add row equilibration ("MuonEq") and a fixed norm
("Muon+"); they are left out, because row equilibration does not reproduce the reference's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bov_megatron.parallel.device import has_fast_bf16_products
from bov_megatron.parallel.regions import region

# Quintic coefficients (a, b, c) of each Polar Express iteration: arXiv 2505.16932 for 5 iterations, safety factor 2e-2,
# cushion 2. Further iterations repeat the last ones.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
STACK_ELEMENTS = 32 * 1024 * 1024
"""Elements of the matrices that are updated together: more would take memory and no longer save time."""
NORM_MARGIN = 1.01
"""Scales singular values to at most 1 / this: iterations diverge above 1, and norms in bf16 are rounded."""


def nesterov(gradients: list[Tensor], momentum_buffers: list[Tensor], momentum: float) -> list[Tensor]:
    """Update `momentum_buffers` in place with `gradients`; return the look-ahead directions. Elementwise, any shape."""
    torch._foreach_lerp_(momentum_buffers, gradients, 1 - momentum)
    return list(torch._foreach_lerp(gradients, momentum_buffers, momentum))


def updates(directions: Sequence[Tensor], second_moments: Sequence[Tensor], steps: int, beta2: float) -> list[Tensor]:
    """The fp32 update of each whole matrix from its direction; second moments are updated in place.

    Matrices of one shape are stacked, so that a GPU gets as many kernels per shape as for a single matrix.

    Args:
        directions: `[R, C]` each, in bf16.
        second_moments: fp32 `[max(R, C)]`, one per matrix.
        steps: iterations of Polar Express.
    """
    by_matrix: list[Tensor] = [None] * len(directions)  # type: ignore[list-item]
    for batch in same_shape_batches([direction.shape for direction in directions]):
        moments = [second_moments[i] for i in batch]
        stacked_moments = torch.stack(moments)
        orthogonal_MRC = polar_express(torch.stack([directions[i] for i in batch]), steps)
        update_MRC = normalize_variance(orthogonal_MRC, stacked_moments, beta2)
        torch._foreach_copy_(moments, list(stacked_moments))
        for i, update in zip(batch, update_MRC, strict=True):
            by_matrix[i] = update
    return by_matrix


def same_shape_batches(shapes: Sequence[tuple[int, ...]], limit: int = STACK_ELEMENTS) -> list[list[int]]:
    """Indices of matrices to stack: of one shape, in order, with at most `limit` elements unless it is one matrix."""
    batches: list[list[int]] = []
    for shape in dict.fromkeys(shapes):
        same = [i for i, other in enumerate(shapes) if other == shape]
        count = max(1, limit // math.prod(shape))
        batches += [same[start : start + count] for start in range(0, len(same), count)]
    return batches


def polar_express(direction_MRC: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of each matrix, approximately: `[M, R, C]` -> `[M, R, C]` bf16, singular values near 1.

    Iterates on the smaller Gram matrix. A zero matrix stays zero.
    """
    x_MRC = direction_MRC.bfloat16()
    tall = x_MRC.size(1) > x_MRC.size(2)
    x_MRC = x_MRC / (torch.linalg.vector_norm(x_MRC, dim=(1, 2), keepdim=True) * NORM_MARGIN + 1e-6)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS_COEFFICIENTS[min(i, len(POLAR_EXPRESS_COEFFICIENTS) - 1)]
        gram = _products(x_MRC.mT, x_MRC) if tall else _products(x_MRC, x_MRC.mT)
        polynomial = _products(gram, gram, added=gram, weight=b, scale=c)
        left, right = (x_MRC, polynomial) if tall else (polynomial, x_MRC)
        x_MRC = _products(left, right, added=x_MRC, weight=a)
    return x_MRC


def _products(
    left: Tensor, right: Tensor, added: Tensor | None = None, weight: float = 0.0, scale: float = 1.0
) -> Tensor:
    """`weight · added + scale · left @ right` of stacked bf16 matrices, summed in fp32 and rounded once."""
    if not has_fast_bf16_products(left.device):
        left, right, added = left.float(), right.float(), None if added is None else added.float()
    if added is None:
        return torch.bmm(left, right).bfloat16()
    return torch.baddbmm(added, left, right, beta=weight, alpha=scale).bfloat16()


def second_moment_size(rows: int, columns: int) -> int:
    """Length of a matrix's second-moment vector: one entry per row, or per column if it is wider than tall."""
    return max(rows, columns)


@region
def normalize_variance(update_MRC: Tensor, second_moment_Mn: Tensor, beta2: float) -> Tensor:
    """NorMuon: normalise the rows (columns, if wider than tall) of orthogonalised updates, keeping each one's norm.

    `second_moment_Mn`, fp32 `[M, max(R, C)]`, is updated in place. Returns fp32 `[M, R, C]`.
    """
    _, rows, columns = update_MRC.shape
    along = 2 if rows >= columns else 1
    update_MRC = update_MRC.float()
    mean_square_Mn = update_MRC.square().mean(dim=along)
    second_moment_Mn.lerp_(mean_square_Mn, 1 - beta2)
    scale_Mn = second_moment_Mn.clamp_min(1e-10).rsqrt()
    # Both norms omit the factor sqrt(size of `along`), which cancels.
    old_norm = mean_square_Mn.sum(dim=1, keepdim=True).sqrt()
    new_norm = (mean_square_Mn * scale_Mn.square()).sum(dim=1, keepdim=True).sqrt()
    scale_Mn = scale_Mn * (old_norm / new_norm.clamp_min(1e-10))
    return update_MRC.mul_(scale_Mn.unsqueeze(along))


def shape_factor(rows: int, columns: int) -> float:
    """Factor on the learning rate of an `[R, C]` matrix, above 1 for tall matrices."""
    return max(1.0, rows / columns) ** 0.5


@region
def cautious_update_(weight: Tensor, update: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
    """`weight -= lr * (update + weight_decay * weight)`, with decay only where `update` shrinks the weight.

    In place, elementwise, any shape. Rates are tensors that broadcast: numbers would be compiled as constants.
    """
    # Elsewhere decay would counteract the update.
    decay = torch.where(update * weight >= 0, weight, 0.0)
    weight.sub_(lr * decay.mul_(weight_decay).add_(update))
