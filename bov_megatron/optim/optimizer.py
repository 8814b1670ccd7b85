"""The optimizer of a run: Muon and AdamW over Megatron model chunks, sharded over data-parallel ranks (ZeRO stage 1).

One step, in order: global gradient norm; stop here, changing nothing, if it is not finite; clip; Muon on the matrices
that this rank owns; AdamW on the rows that it owns; gather everybody's updated weights, or with
`parallel.overlap_param_gather` send them off, for the next forward pass to wait for. The state is the tensors and
one step count: every schedule is a function of that count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bov_megatron.optim import schedules, sharded_state
from bov_megatron.optim.gradients import clip_gradients, global_gradient_norm
from bov_megatron.optim.groups import GroupSettings, group_settings
from bov_megatron.optim.managed_parameter import ManagedParameter, managed_parameters
from bov_megatron.optim.muon_sharded import ShardedMuon, orthogonalisation_cost
from bov_megatron.optim.sharding import (
    SMALL_TENSOR_ELEMENTS,
    OptimizerProcessGroups,
    balance,
    group_rank,
    group_size,
    own_rows,
    replicate_rows,
    split_rows,
)
from bov_megatron.optim.weight_gatherer import WeightGatherer, wait_before_forward
from bov_megatron.parallel.process_groups import twin
from bov_megatron.recipe import Recipe


@dataclass(frozen=True)
class UpdateResult:
    """What one call of `step` did."""

    applied: bool
    """False where a gradient was not finite: weights, state and step count are then as before."""
    grad_norm: float
    """Global L2 norm before clipping; `nan` where it was not finite."""


class BovOptimizer:
    """Muon + AdamW (arXiv 2606.02780, "Optimisation"), or AdamW alone, by `recipe.optimizer.name`.

    `model_chunks` are this rank's pipeline chunks, wrapped in Megatron's DistributedDataParallel with
    `use_distributed_optimizer=False`, so that `main_grad` holds gradients already reduced over data and context
    parallel ranks; unwrapped modules work too, with `grad`. Parameters carry the attributes that
    `ManagedParameter` lists. Parameters may be fp32, updated in place, or bf16, with fp32 main weights beside them.

    Make it after the model has its initial weights, or call `reload_model_params` when they have been written.
    All ranks must call `step` together.
    """

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        recipe: Recipe,
        total_steps: int,
        process_groups: OptimizerProcessGroups | None = None,
    ):
        self.model_chunks = list(model_chunks)
        self.config = recipe.optimizer
        self.total_steps = total_steps
        self.groups = process_groups or OptimizerProcessGroups.from_parallel_state()
        self.settings = group_settings(recipe)
        self.step_count = 0
        """Updates applied so far; the schedules' position and AdamW's bias correction."""
        self.parameters = managed_parameters(self.model_chunks, group_size(self.groups.tensor))
        self._assign_rows(sharded=recipe.parallel.use_distributed_optimizer)
        self.overlap_gather = recipe.parallel.overlap_param_gather
        self.gatherer = self._gatherer(on_host=False)
        self.host_gatherer = self._gatherer(on_host=True)
        mine = [p for p in self.parameters if p.main is not None]
        self.muon = ShardedMuon(
            [p for p in mine if self.settings[p.kind].algorithm == "muon"],
            self.groups.tensor,
            self.config.newton_schulz_steps,
            self.config.muon_beta2,
        )
        self.adamw_parameters = [p for p in mine if self.settings[p.kind].algorithm == "adamw"]
        self.adamw = make_adamw(self.adamw_parameters, self.settings, self.config.eps)

    def _gatherer(self, on_host: bool) -> WeightGatherer:
        parameters = [p for p in self.parameters if p.on_host == on_host]
        overlap, group = self.overlap_gather and not on_host, self.groups.data
        if on_host and parameters and group_size(group) > 1:
            group = twin(group, "gloo")
        gatherer = WeightGatherer(
            [p.parameter for p in parameters],
            [p.assignment for p in parameters],
            group,
            positions=[p.forward_position for p in parameters] if overlap else None,
        )
        if overlap:
            wait_before_forward(self.model_chunks, gatherer, {id(p.parameter): p.forward_position for p in parameters})
        return gatherer

    def _assign_rows(self, sharded: bool) -> None:
        """Decide which data-parallel rank updates what; the same decision on every rank."""
        ranks, rank = group_size(self.groups.data), group_rank(self.groups.data)
        matrices = [p for p in self.parameters if self.settings[p.kind].algorithm == "muon"]
        owners = dict(
            zip(map(id, matrices), balance([orthogonalisation_cost(p) for p in matrices], ranks), strict=True)
        )
        for p in self.parameters:
            rows = p.parameter.size(0)
            if not sharded or ranks == 1:
                assignment = replicate_rows(rows, ranks)
            elif id(p) in owners:
                assignment = own_rows(rows, owners[id(p)], ranks)
            elif p.parameter.numel() < SMALL_TENSOR_ELEMENTS:
                assignment = replicate_rows(rows, ranks)
            else:
                assignment = split_rows(rows, ranks)
            p.assign(assignment, rank)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients at hand, `nan` if any is not finite; collective. See global_gradient_norm."""
        return global_gradient_norm(self.parameters, self.groups)

    @torch.no_grad()
    def step(self, gradient_norm: float | None = None) -> UpdateResult:
        """Apply one update from the gradients at hand; collective. Gradients are left as they are, or clipped.

        With `parallel.overlap_param_gather` modules wait for their own weights; call `finish_gather` before reading
        weights in any other way.

        Args:
            gradient_norm: of these gradients, as `gradient_norm()` gave it; None computes it, and waits for the device.
        """
        norm = self.gradient_norm().item() if gradient_norm is None else gradient_norm
        if not math.isfinite(norm):
            return UpdateResult(applied=False, grad_norm=norm)
        self.finish_gather()  # what is still to be written would overwrite this update
        multiplier = schedules.lr_multiplier(self.step_count, self.total_steps, self.config)
        if self.config.clip_grad > 0:
            clip_gradients(self.parameters, norm, self.config.clip_grad)
        self._step_muon(multiplier)
        self._step_adamw(multiplier)
        on_device = [p.main for p in self.parameters if not p.on_host]
        if self.overlap_gather:
            self.gatherer.start(on_device)
        else:
            self.gatherer.gather(on_device)
        self.host_gatherer.gather([p.main for p in self.parameters if p.on_host])
        self.step_count += 1
        return UpdateResult(applied=True, grad_norm=norm)

    def _step_muon(self, multiplier: float) -> None:
        settings, step, total = self.settings["matrix"], self.step_count, self.total_steps
        self.muon.step(
            lr=settings.lr * multiplier,
            weight_decay=settings.weight_decay * schedules.muon_decay_multiplier(step, total),
            momentum=schedules.muon_momentum(step, total, self.config),
        )

    def _step_adamw(self, multiplier: float) -> None:
        if self.adamw is None:
            return
        for group in self.adamw.param_groups:
            group["lr"] = self.settings[group["kind"]].lr * multiplier
        for p in self.adamw_parameters:
            p.main.grad = p.row_gradient()
            self.adamw.state[p.main]["step"].fill_(self.step_count)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def finish_gather(self) -> None:
        """Wait until all weights of the last update have arrived. Concerns this rank alone."""
        self.gatherer.finish()

    def reload_model_params(self) -> None:
        """Take the fp32 main weights from the model again, e.g. after loading weights without optimizer state."""
        self.finish_gather()
        for p in self.parameters:
            p.reload_main()

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each kind that the next step will use, for logging."""
        multiplier = schedules.lr_multiplier(self.step_count, self.total_steps, self.config)
        return {kind: settings.lr * multiplier for kind, settings in self.settings.items()}

    def state_tensors(self) -> list[tuple[str, ManagedParameter, Tensor]]:
        """This rank's state as (state name, parameter, tensor like the parameter's rows on this rank).

        `main_param` where it is separate, `momentum` for Muon, `exp_avg` and `exp_avg_sq` for AdamW.
        """
        tensors = [("main_param", p, p.main) for p in self.parameters if p.main is not None and p.has_separate_main]
        tensors += [("momentum", matrix.managed, matrix.momentum) for matrix in self.muon.matrices]
        for name in ("exp_avg", "exp_avg_sq"):
            tensors += [(name, p, self.adamw.state[p.main][name]) for p in self.adamw_parameters]
        return tensors

    def second_moments(self) -> list[tuple[str, ManagedParameter, str, Tensor]]:
        """Muon's second moments on this rank as (`second_moment`, parameter, canonical name, `[n]` tensor)."""
        return [
            ("second_moment", matrix.managed, canonical, tensor)
            for matrix in self.muon.matrices
            for canonical, tensor in zip(matrix.managed.names, matrix.second_moments, strict=True)
        ]

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """State for megatron.core.dist_checkpointing, to save or to load into; see `sharded_state`."""
        return sharded_state.build(self, model_sharded_state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `dist_checkpointing.load` returned for the result of `sharded_state_dict`."""
        self.finish_gather()
        sharded_state.restore(self, state_dict)


def make_adamw(
    parameters: Sequence[ManagedParameter], settings: dict[str, GroupSettings], eps: float
) -> torch.optim.AdamW | None:
    """torch's fused AdamW over this rank's rows, one group per kind, with all state in place; None without rows.

    Every tensor gets a step tensor of its own: a shared one would count once per parameter.
    """
    if not parameters:
        return None
    groups = []
    for kind in dict.fromkeys(p.kind for p in parameters):
        rows = [p.main for p in parameters if p.kind == kind]
        s = settings[kind]
        groups.append({"params": rows, "kind": kind, "lr": s.lr, "betas": s.betas, "weight_decay": s.weight_decay})
    adamw = torch.optim.AdamW(groups, eps=eps, fused=True)
    for p in parameters:
        adamw.state[p.main] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.main.device),
            "exp_avg": torch.zeros_like(p.main),
            "exp_avg_sq": torch.zeros_like(p.main),
        }
    return adamw
