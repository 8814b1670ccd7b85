"""The global norm of gradients, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.optim.parameter_shard import ParameterShard
from bov_megatron.optim.sharding import OptimizerProcessGroups, group_rank, group_size


@torch.no_grad()
def global_gradient_norm(parameters: Sequence[ParameterShard], groups: OptimizerProcessGroups) -> Tensor:
    """L2 norm over every element of the model once, `nan` if any gradient is not finite; collective.

    Weights that tensor-parallel ranks replicate count on the first rank only. Returns a 0-dim fp64 tensor on the
    gradients' device, without waiting for it; the same bits on every rank, so that ranks decide alike.
    """
    first = group_rank(groups.tensor) == 0
    counted = [p.gradient() for p in parameters if first or p.local.partition_dim >= 0]
    others = [p.gradient() for p in parameters if not (first or p.local.partition_dim >= 0)]
    devices = [
        p.local.parameter.device for p in parameters if not p.local.on_host
    ]  # host tables' norms join the others there
    device = devices[0] if devices else torch.device("cpu")
    squares = torch.nn.utils.get_total_norm(counted).to(device, torch.float64).square()
    if others:  # add nothing, unless this rank's copy of them has gone bad: 0 · nan and 0 · inf are nan
        squares += 0 * torch.nn.utils.get_total_norm(others).to(device, torch.float64)
    if group_size(groups.model) > 1:
        dist.all_reduce(squares, group=groups.model)
    finite = squares.isfinite()
    verdict = torch.stack([torch.where(finite, squares, 0.0), (~finite).double()])
    if group_size(groups.data) > 1:  # the maximum also evens out what rounding makes of the sums
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=groups.data)
    return torch.where(verdict[1] > 0, math.nan, verdict[0].sqrt())


@torch.no_grad()
def clip_gradients(parameters: Sequence[ParameterShard], norm: float, maximum: float) -> None:
    """Scale this rank's rows of every gradient, in place, such that the global norm is at most `maximum`."""
    factor = maximum / (norm + 1e-6)
    if factor >= 1:
        return
    mine = [p.gradient()[p.rows[0] : p.rows[1]] for p in parameters if p.has_rows]
    if mine:
        torch._foreach_mul_(mine, factor)
