"""AdamW under DeepSpeed's ZeRO, with the interface of optim.optimizer.BovOptimizer.

DeepSpeed reduces gradients, clips them, updates and gathers. This sets the learning rates, counts steps, and converts
ZeRO's shards to rows in checkpoints, so that both engines read each other's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.engines.deepspeed.state import Stretch, ZeroParameter, gather_ranges
from bov_megatron.optim import schedules, sharded_state
from bov_megatron.optim.adamw import MOMENTS, allocate_state, set_schedule
from bov_megatron.optim.groups import group_settings
from bov_megatron.optim.optimizer import UpdateResult
from bov_megatron.optim.sharding import OptimizerProcessGroups
from bov_megatron.recipe import Recipe


class ZeroOptimizer:
    """Optimizer of a DeepSpeed engine.

    Args:
        engine: DeepSpeed's, made with AdamW over the same parameters.
        parameters: all of the model's, in the same order on every data-parallel rank.
        recipe: the run.
        total_steps: of the schedule.
    """

    def __init__(self, engine, parameters: Sequence[ZeroParameter], recipe: Recipe, total_steps: int):
        self.engine, self.parameters = engine, list(parameters)
        self.config, self.settings, self.total_steps = recipe.optimizer, group_settings(recipe), total_steps
        self.groups = OptimizerProcessGroups.from_parallel_state()
        self.partitions_weights = recipe.deepspeed.zero_stage == 3
        self.has_separate_main = recipe.train.precision == "bf16"
        self.step_count = 0
        """Updates applied so far, the schedules' position."""
        self.moments_since = 0
        """`step_count` at which all moments were zero: later than 0 after loading a checkpoint of weights alone."""
        self.adamw = engine.basic_optimizer
        for p in self.parameters:
            p.stretch = self._stretch(p)
        gather_ranges(self.parameters, self.groups.data)
        allocate_state(self.adamw, self._flats())

    def _stretch(self, p: ZeroParameter) -> Stretch | None:
        """This rank's part of a parameter."""
        zero, parameter = self.engine.optimizer, p.local.parameter
        if self.partitions_weights:
            group, offset, stored = zero.grad_position[zero.get_param_id(parameter)]
            start = min(stored * dist.get_rank(self.groups.data), p.shape.numel())
            stop = min(start + stored, p.shape.numel())  # the last ranks' partitions are padded
            return Stretch(zero.fp32_partitioned_groups_flat[group], offset, start, stop) if start < stop else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self.adamw.param_groups[mapping.param_group_index]["params"][0]
        start = mapping.lp_fragment_address.start
        return Stretch(flat, mapping.hp_fragment_address.start, start, start + mapping.lp_fragment_address.numel)

    def _flats(self) -> list[Tensor]:
        """The flat fp32 weights that DeepSpeed's optimizer updates on this rank, padding included."""
        if self.partitions_weights:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.adamw.param_groups]

    @torch.no_grad()
    def step(self) -> UpdateResult:
        """Apply one update from the current gradients, which are then dropped; collective."""
        set_schedule(self.adamw, self.learning_rates(), self.step_count - self.moments_since)
        self.engine.step()
        if self.engine.optimizer.overflow:
            self.gather_persistent()
            return UpdateResult(applied=False, grad_norm=math.nan)
        self.step_count += 1
        return UpdateResult(applied=True, grad_norm=float(self.engine.get_global_grad_norm()))

    @torch.no_grad()
    def discard(self) -> None:
        """Drop the gradients without an update; collective."""
        # Where DeepSpeed keeps gradients differs by stage, precision and offload. Its own handling of a norm that is
        # not finite clears all of them, so the norm is replaced by its marker for one.
        zero = self.engine.optimizer
        if hasattr(zero, "clear_hp_grads"):  # ZeRO 1 in bf16
            zero.zero_grad()
            return
        name, invalid = "scaled_global_norm", torch.tensor(-1.0)
        if self.partitions_weights:
            name = "_get_norm_groups"
        setattr(zero, name, lambda: [invalid] if self.partitions_weights else invalid)
        try:
            zero.step()
        finally:
            delattr(zero, name)
        self.gather_persistent()

    def gather_persistent(self) -> None:
        """ZeRO 3: gather the small parameters that all ranks hold whole; collective.

        DeepSpeed does so after an update, but not when it leaves one out.
        """
        if self.partitions_weights:
            zero = self.engine.optimizer
            zero._partition_all_parameters()  # parameters that are whole would not be gathered again
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gradient(self, p: ZeroParameter, stretch: Stretch) -> Tensor:
        """This rank's stretch of a parameter's mean gradient, flat; between backward and `step` only."""
        parameter = p.local.parameter
        if self.partitions_weights:
            gradient = self.engine.optimizer.get_local_fp32_grad_for_param(parameter)
            return gradient[: stretch.stop - stretch.start]
        gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        # ZeRO 1 in bf16 keeps the whole gradient.
        return gradient[stretch.start : stretch.stop] if gradient.numel() == p.shape.numel() else gradient

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each kind in the next step."""
        multiplier = schedules.lr_multiplier(self.step_count, self.total_steps, self.config, self.moments_since)
        return {kind: settings.lr * multiplier for kind, settings in self.settings.items()}

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Set the fp32 weights from the model's, e.g. after loading weights without optimizer state."""
        self.engine.optimizer.refresh_fp32_params()

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """State for megatron.core.dist_checkpointing, to save or to load into; collective."""
        return sharded_state.build(StateAsRows(self), model_sharded_state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `dist_checkpointing.load` returned for the result of `sharded_state_dict`; collective."""
        self.reload_model_params()
        rows = StateAsRows(self, empty=True)
        sharded_state.restore(rows, state_dict)
        rows.store()


class StateAsRows:
    """The optimizer's state as blocks of rows in host memory, for optim.sharded_state; collective.

    Args:
        empty: only allocate the blocks, to be filled, then written back by `store`.
    """

    def __init__(self, optimizer: ZeroOptimizer, empty: bool = False):
        self.optimizer, self.groups = optimizer, optimizer.groups
        self.step_count, self.moments_since = optimizer.step_count, optimizer.moments_since
        names = (sharded_state.MAIN, *MOMENTS) if optimizer.has_separate_main else MOMENTS
        self.blocks = []
        for name in names:
            for p in optimizer.parameters:
                rows = p.empty_rows(torch.float32) if empty else p.to_rows(self._reader(name), torch.float32)
                self.blocks.append((name, p, rows))

    def _reader(self, name: str):
        """A function that returns a stretch of one state, a view of DeepSpeed's flat tensor."""
        if name == sharded_state.MAIN:
            return lambda stretch: stretch.of(stretch.flat)
        return lambda stretch: stretch.of(self.optimizer.adamw.state[stretch.flat][name])

    def state_tensors(self) -> list[tuple[str, ZeroParameter, Tensor]]:
        """As of BovOptimizer."""
        return [block for block in self.blocks if block[1].has_rows]

    def second_moments(self) -> list:
        return []  # only Muon has them

    def store(self) -> None:
        """Write the blocks into DeepSpeed's flat tensors; collective."""
        for name, p, rows in self.blocks:
            p.from_rows(rows, self._reader(name), torch.float32)
        self.optimizer.step_count, self.optimizer.moments_since = self.step_count, self.moments_since
