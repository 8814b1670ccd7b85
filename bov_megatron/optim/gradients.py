"""Gradients that are ready, their global norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bov_megatron.optim.managed_parameter import ManagedParameter
from bov_megatron.optim.sharding import OptimizerProcessGroups, group_rank, group_size


def gradient_ready(parameter: nn.Parameter) -> None:
    """Say that `parameter.main_grad` holds all that a micro-batch's backward pass has to add to it.

    For whoever writes `main_grad` past autograd; once per backward pass, after the last write. Where gradients are
    reduced while the backward pass goes on (engines/data_parallel.py), the reduction waits for this call; elsewhere it
    does nothing.
    """
    ready = getattr(parameter, "on_gradient_ready", None)
    if callable(ready):
        ready()


@torch.no_grad()
def global_gradient_norm(parameters: Sequence[ManagedParameter], groups: OptimizerProcessGroups) -> Tensor:
    """L2 norm over every element of the model once, `nan` if any gradient is not finite; collective.

    Weights that tensor-parallel ranks replicate count on the first rank only. Returns a 0-dim fp64 tensor on the
    gradients' device, without waiting for it; the same bits on every rank, so that ranks decide alike.
    """
    first = group_rank(groups.tensor) == 0
    counts = [(p.partition_dim >= 0 or first) and not p.counted_elsewhere for p in parameters]
    counted = [p.gradient() for p, counted_here in zip(parameters, counts, strict=True) if counted_here]
    others = [p.gradient() for p, counted_here in zip(parameters, counts, strict=True) if not counted_here]
    devices = [p.parameter.device for p in parameters if not p.on_host]  # host tables' norms join the others there
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
def clip_gradients(parameters: Sequence[ManagedParameter], norm: float, maximum: float) -> None:
    """Scale this rank's rows of every gradient, in place, such that the global norm is at most `maximum`."""
    factor = maximum / (norm + 1e-6)
    if factor >= 1:
        return
    mine = [p.gradient()[p.rows[0] : p.rows[1]] for p in parameters if p.main is not None]
    if mine:
        torch._foreach_mul_(mine, factor)
