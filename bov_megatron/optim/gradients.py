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

    A rank counts the rows that it updates. Copies count once: on the first tensor- or data-parallel rank. Returns a
    0-dim fp64 tensor on the gradients' device, without waiting for it; the same on every rank, as one reduction over
    all gives it, so that all ranks decide alike.
    """
    counted: list[Tensor] = []
    copies: list[Tensor] = []
    for p in parameters:
        first_tensor = group_rank(groups.tensor) == 0 or p.local.partition_dim >= 0
        first_data = group_rank(groups.data) == 0 or not p.assignment.replicated
        gradient = p.row_gradient()
        if p.has_rows:
            (counted if first_tensor and first_data else copies).append(gradient)
    # Norms of host tables move to the device of the others.
    devices = [p.local.parameter.device for p in parameters if not p.local.on_host]
    device = devices[0] if devices else torch.device("cpu")
    squares = torch.nn.utils.get_total_norm(counted).to(device, torch.float64).square()
    if copies:  # they add 0, or nan if this rank's copy is not finite
        squares += 0 * torch.nn.utils.get_total_norm(copies).to(device, torch.float64)
    if group_size(groups.data) * group_size(groups.model) > 1:
        dist.all_reduce(squares)  # the model's and the data-parallel ranks are all ranks
    return torch.where(squares.isfinite(), squares.sqrt(), math.nan)


@torch.no_grad()
def clip_gradients(parameters: Sequence[ParameterShard], norm: float, maximum: float) -> None:
    """Scale this rank's rows of every gradient, in place, such that the global norm is at most `maximum`."""
    factor = maximum / (norm + 1e-6)
    if factor >= 1:
        return
    mine = [p.gradient()[p.rows[0] : p.rows[1]] for p in parameters if p.has_rows]
    if mine:
        torch._foreach_mul_(mine, factor)
