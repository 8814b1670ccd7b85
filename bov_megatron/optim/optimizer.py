"""The optimizer of a run: Muon and AdamW over Megatron model chunks, sharded over data-parallel ranks (ZeRO stage 1).

One step: compute the global gradient norm, and return without an update if it is not finite; clip; update the matrices
(Muon) and rows (AdamW) that this rank owns; gather all ranks' updated weights, in the background with
`parallel.overlap_param_gather`. Rows of tables in host memory stay with their owners until they are read. The state is
tensors and one step count; every schedule is a function of that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bov_megatron.optim import schedules, sharded_state
from bov_megatron.optim.adamw import MOMENTS, allocate_state, make_adamw, set_schedule
from bov_megatron.optim.gradients import clip_gradients, global_gradient_norm
from bov_megatron.optim.groups import GroupSettings, group_settings
from bov_megatron.optim.muon_sharded import ShardedMuon, orthogonalisation_cost
from bov_megatron.optim.parameter_shard import ParameterShard
from bov_megatron.optim.sharding import (
    SMALL_TENSOR_ELEMENTS,
    OptimizerProcessGroups,
    RowAssignment,
    balance,
    group_rank,
    group_size,
    own_rows,
    replicate_rows,
    split_rows,
)
from bov_megatron.optim.weight_gatherer import WeightGatherer, wait_before_forward
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.parallel.process_groups import twin
from bov_megatron.recipe import Recipe


@dataclass(frozen=True)
class UpdateResult:
    """Result of `BovOptimizer.step`."""

    applied: bool
    """False where a gradient was not finite; weights, state and step count are then unchanged."""
    grad_norm: float
    """Global L2 norm before clipping; `nan` where it was not finite."""


class BovOptimizer:
    """Muon + AdamW (arXiv 2606.02780, "Optimisation"), or AdamW alone, by `recipe.optimizer.name`.

    Gradients are Megatron's `main_grad`, or `grad` where there is none, already reduced over data- and context-parallel
    ranks; only the rows that this rank updates are read. fp32 parameters are updated in place; bf16
    ones have separate fp32 main weights. Frozen parameters are ignored.

    Construct it after the model has its initial weights, or call `reload_model_params` once they are set.

    Args:
        parameters: of this rank's model chunks, in the same order on all data-parallel ranks.
        chunks: the model chunks, whose modules wait for their weights with `parallel.overlap_param_gather`.
    """

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        recipe: Recipe,
        total_steps: int,
        chunks: Iterable[nn.Module] = (),
    ):
        self.config = recipe.optimizer
        self.total_steps = total_steps
        self.groups = OptimizerProcessGroups.from_parallel_state()
        self.settings = group_settings(recipe)
        self.step_count = 0
        """Updates applied so far, the schedules' position."""
        self.moments_since = 0
        """`step_count` at which all moments were zero: later than 0 after loading a checkpoint of weights alone."""
        trained = [local for local in parameters if local.parameter.requires_grad]
        ranks = group_size(self.groups.data)
        assignments = assign_rows(trained, self.settings, ranks, sharded=recipe.parallel.use_distributed_optimizer)
        rank = group_rank(self.groups.data)
        self.parameters = [ParameterShard(*pair, rank) for pair in zip(trained, assignments, strict=True)]
        self.overlap_gather = recipe.parallel.overlap_param_gather
        self.gatherer = self._gatherer(on_host=False)
        self.host_gatherer = self._gatherer(on_host=True)
        self._host_rows_differ = False
        """Whether ranks have updated their rows of host tables since they last gathered them."""
        if self.overlap_gather:
            wait_before_forward(chunks, self.gatherer, [local for local in trained if not local.on_host])
        mine = [p for p in self.parameters if p.has_rows]
        self.muon = ShardedMuon(
            [p for p in mine if self.settings[p.local.kind].algorithm == "muon"],
            self.groups.tensor,
            self.config.newton_schulz_steps,
            self.config.muon_beta2,
        )
        self.adamw_parameters = [p for p in mine if self.settings[p.local.kind].algorithm == "adamw"]
        self.adamw = make_adamw([(p.local.kind, p.main) for p in self.adamw_parameters], self.settings, self.config.eps)
        if self.adamw is not None:
            allocate_state(self.adamw, [p.main for p in self.adamw_parameters])

    def _gatherer(self, on_host: bool) -> WeightGatherer:
        parameters = [p for p in self.parameters if p.local.on_host == on_host]
        group = self.groups.data
        if on_host and parameters and group is not None and group_size(group) > 1:
            group = twin(group, "gloo")
        return WeightGatherer(
            [p.local.parameter for p in parameters],
            [p.assignment for p in parameters],
            group,
            positions=[p.local.forward_position for p in parameters] if self.overlap_gather and not on_host else None,
        )

    def gradient_norm(self) -> Tensor:
        """See `global_gradient_norm`; collective."""
        return global_gradient_norm(self.parameters, self.groups)

    @torch.no_grad()
    def step(self, gradient_norm: float | None = None) -> UpdateResult:
        """Apply one update from the current gradients, which may be clipped in place; collective.

        With `parallel.overlap_param_gather` modules wait for their own weights; call `finish_gather` before reading
        weights in any other way. A host table has new rows on the rank that updates them alone.

        Args:
            gradient_norm: value of `gradient_norm()`; None computes it, and waits for the device.
        """
        norm = self.gradient_norm().item() if gradient_norm is None else gradient_norm
        if not math.isfinite(norm):
            return UpdateResult(applied=False, grad_norm=norm)
        self.gatherer.finish()  # a pending gather would overwrite this update
        if self.config.clip_grad > 0:
            clip_gradients(self.parameters, norm, self.config.clip_grad)
        self._step_muon()
        self._step_adamw()
        on_device = [p.main for p in self.parameters if not p.local.on_host]
        if self.overlap_gather:
            self.gatherer.start(on_device)
        else:
            self.gatherer.gather(on_device)
        self._write_host_rows()
        self.step_count += 1
        return UpdateResult(applied=True, grad_norm=norm)

    def _step_muon(self) -> None:
        settings, step, total = self.settings["matrix"], self.step_count, self.total_steps
        self.muon.step(
            lr=self.learning_rates()["matrix"],
            weight_decay=settings.weight_decay * schedules.muon_decay_multiplier(step, total),
            momentum=schedules.muon_momentum(step, total, self.config),
        )

    def _step_adamw(self) -> None:
        if self.adamw is None:
            return
        set_schedule(self.adamw, self.learning_rates(), self.step_count - self.moments_since)
        for p in self.adamw_parameters:
            p.main.grad = p.row_gradient()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _write_host_rows(self) -> None:
        """Write this rank's new rows into host tables."""
        for p in self.parameters:
            if p.local.on_host:
                if p.has_separate_main:
                    p.local.parameter[p.rows[0] : p.rows[1]] = p.main
                self._host_rows_differ = True

    def finish_gather(self) -> None:
        """Wait until this rank has all weights of the last update; collective where tables are in host memory, over the
        data-parallel ranks."""
        self.gatherer.finish()
        if self._host_rows_differ:
            self.host_gatherer.gather([p.main for p in self.parameters if p.local.on_host])
            self._host_rows_differ = False

    def reload_model_params(self) -> None:
        """Set the fp32 main weights from the model's, e.g. after loading weights without optimizer state."""
        self.finish_gather()
        for p in self.parameters:
            p.reload_main()

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each kind in the next step."""
        multiplier = schedules.lr_multiplier(self.step_count, self.total_steps, self.config, self.moments_since)
        return {kind: settings.lr * multiplier for kind, settings in self.settings.items()}

    def state_tensors(self) -> list[tuple[str, ParameterShard, Tensor]]:
        """This rank's state as (state name, parameter, tensor with the shape of this rank's rows).

        Names: `main_param` where it is separate, `momentum` for Muon, `exp_avg` and `exp_avg_sq` for AdamW.
        """
        tensors = [(sharded_state.MAIN, p, p.main) for p in self.parameters if p.has_rows and p.has_separate_main]
        tensors += [("momentum", matrix.shard, matrix.momentum) for matrix in self.muon.matrices]
        if self.adamw is not None:
            state = self.adamw.state
            tensors += [(name, p, state[p.main][name]) for name in MOMENTS for p in self.adamw_parameters]
        return tensors

    def second_moments(self) -> list[tuple[ParameterShard, str, Tensor]]:
        """Muon's second moments that this rank has, as (parameter, canonical name, `[n]` tensor)."""
        return [
            (matrix.shard, canonical, tensor)
            for matrix in self.muon.matrices
            if matrix.second_moments
            for canonical, tensor in zip(matrix.shard.local.names, matrix.second_moments, strict=True)
        ]

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """State for megatron.core.dist_checkpointing, to save or to load into; see `sharded_state`."""
        return sharded_state.build(self, model_sharded_state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `dist_checkpointing.load` returned for the result of `sharded_state_dict`."""
        self.finish_gather()
        sharded_state.restore(self, state_dict)


def assign_rows(
    parameters: Sequence[LocalParameter], settings: dict[str, GroupSettings], ranks: int, sharded: bool
) -> list[RowAssignment]:
    """Which of `ranks` data-parallel ranks updates which rows of each parameter; the same on every rank."""
    matrices = [local for local in parameters if settings[local.kind].algorithm == "muon"]
    owners = dict(zip(matrices, balance([orthogonalisation_cost(local) for local in matrices], ranks), strict=True))
    assignments = []
    for local in parameters:
        rows, small = local.shape[0], local not in owners and local.shape.numel() < SMALL_TENSOR_ELEMENTS
        if not sharded or ranks == 1 or small:
            assignments.append(replicate_rows(rows, ranks))
        elif local in owners:
            assignments.append(own_rows(rows, owners[local], ranks))
        else:
            assignments.append(split_rows(rows, ranks))
    return assignments
