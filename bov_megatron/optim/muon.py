"""Muon's update of one whole matrix on one rank, as functions.

Steps, in the order of the reference: Nesterov momentum, orthogonalisation by Polar Express in bf16, NorMuon variance
normalisation, cautious weight decay. Shapes: a matrix is `[R, C]` (rows = outputs, columns = inputs).

Sources: Muon (kellerjordan.github.io/posts/muon); Polar Express, arXiv 2505.16932; NorMuon, arXiv 2510.05491; used
together in arXiv 2606.02780. Later versions of that paper's code add row equilibration ("MuonEq") and a fixed norm
("Muon+"); they are left out, because row equilibration does not reproduce the reference's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bov_megatron.parallel.device import has_fast_bf16_products

# Quintic coefficients (a, b, c) of each Polar Express iteration: arXiv 2505.16932 for 5 iterations, safety factor 2e-2,
# cushion 2. Further iterations repeat the last ones.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN = 1.01
"""Scales singular values to at most 1 / this: iterations diverge above 1, and norms in bf16 are rounded."""


def nesterov(gradient: Tensor, momentum_buffer: Tensor, momentum: float) -> Tensor:
    """Update `momentum_buffer` in place with `gradient`; return the look-ahead direction. Elementwise, any shape."""
    momentum_buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(momentum_buffer, momentum)


def polar_express(direction_RC: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of a matrix, approximately: `[R, C]` -> `[R, C]` bf16, singular values near 1.

    Iterates on the smaller Gram matrix. A zero matrix stays zero.
    """
    x_RC = direction_RC.bfloat16()
    tall = x_RC.size(0) > x_RC.size(1)
    x_RC = x_RC / (x_RC.norm() * NORM_MARGIN + 1e-6)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS_COEFFICIENTS[min(i, len(POLAR_EXPRESS_COEFFICIENTS) - 1)]
        gram = _product(x_RC.mT, x_RC) if tall else _product(x_RC, x_RC.mT)
        polynomial = b * gram + c * _product(gram, gram)
        x_RC = a * x_RC + (_product(x_RC, polynomial) if tall else _product(polynomial, x_RC))
    return x_RC


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of bf16 matrices, summed in fp32."""
    if has_fast_bf16_products(left.device):
        return left @ right
    return (left.float() @ right.float()).bfloat16()


def second_moment_size(rows: int, columns: int) -> int:
    """Length of a matrix's second-moment vector: one entry per row, or per column if it is wider than tall."""
    return max(rows, columns)


def normalize_variance(update_RC: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon: normalise the rows (columns, if wider than tall) of an orthogonalised update, keeping its total norm.

    `second_moment`, fp32 `[max(R, C)]`, is updated in place. Returns fp32 `[R, C]`.
    """
    rows, columns = update_RC.shape
    along = 1 if rows >= columns else 0
    update_RC = update_RC.float()
    mean_square = update_RC.square().mean(dim=along)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    # Both norms omit the factor sqrt(size of `along`), which cancels.
    old_norm = mean_square.sum().sqrt()
    new_norm = (mean_square * scale.square()).sum().sqrt()
    scale = scale * (old_norm / new_norm.clamp_min(1e-10))
    return update_RC * scale.unsqueeze(along)


def shape_factor(rows: int, columns: int) -> float:
    """Factor on the learning rate of an `[R, C]` matrix, above 1 for tall matrices."""
    return max(1.0, rows / columns) ** 0.5


def cautious_update_(weight: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """`weight -= lr * (update + weight_decay * weight)`, with decay only where `update` shrinks the weight.

    In place, elementwise, any shape; `lr` may be a tensor that broadcasts.
    """
    decay = torch.where(update * weight >= 0, weight, 0.0)  # elsewhere decay would counteract the update
    weight.sub_(lr * decay.mul_(weight_decay).add_(update))
