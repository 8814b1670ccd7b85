"""AdamW under DeepSpeed's ZeRO, as the rest of this package knows an optimizer.

DeepSpeed reduces gradients, clips them, updates and gathers. This says with which rates, counts steps, and turns
ZeRO's stretches into the rows that checkpoints hold, so that either engine reads what the other wrote.
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
    """What optim.BovOptimizer is to Megatron's engine, around a DeepSpeed engine.

    Args:
        engine: DeepSpeed's, made with AdamW over the same parameters.
        parameters: all of the model's, in its own order, the same on every data-parallel rank.
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
        """Updates applied so far; the schedules' position and AdamW's bias correction."""
        self.adamw = engine.basic_optimizer
        for p in self.parameters:
            p.stretch = self._stretch(p)
        gather_ranges(self.parameters, self.groups.data)
        allocate_state(self.adamw, self._flats())

    def _stretch(self, p: ZeroParameter) -> Stretch | None:
        """This rank's part of a parameter, from where DeepSpeed 0.19.8 keeps it."""
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
        """The fp32 weights of this rank as DeepSpeed's optimizer updates them, padding included."""
        if self.partitions_weights:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.adamw.param_groups]

    @torch.no_grad()
    def step(self) -> UpdateResult:
        """Apply one update from the gradients at hand; collective. They are gone afterwards."""
        set_schedule(self.adamw, self.learning_rates(), self.step_count)
        self.engine.step()
        if self.engine.optimizer.overflow:
            self.gather_persistent()
            return UpdateResult(applied=False, grad_norm=math.nan)
        self.step_count += 1
        return UpdateResult(applied=True, grad_norm=float(self.engine.get_global_grad_norm()))

    @torch.no_grad()
    def discard(self) -> None:
        """Leave the update out and forget the gradients, the way DeepSpeed does where they are not finite; collective.

        What it keeps of gradients differs by stage, precision and offload, and its own way out knows all of it.
        """
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
        """ZeRO 3: give all ranks the small parameters that they hold whole, as their partitions have them; collective.

        DeepSpeed does it after an update, and not where it leaves one out.
        """
        if self.partitions_weights:
            zero = self.engine.optimizer
            zero._partition_all_parameters()  # what is there already would not be gathered again
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gradient(self, p: ZeroParameter, stretch: Stretch) -> Tensor:
        """This rank's stretch of a parameter's mean gradient, flat; between backward and `step` only."""
        if self.partitions_weights:
            found = self.engine.optimizer.get_local_fp32_grad_for_param(p.local.parameter)
            return found[: stretch.stop - stretch.start]
        found = p.local.parameter._hp_mapping.get_lp_grad_fragment(p.local.parameter._index_in_param_group).flatten()
        if found.numel() == p.shape.numel():  # ZeRO 1 in bf16 keeps all of it
            found = found[stretch.start : stretch.stop]
        return found

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each kind that the next step will use, for logging."""
        multiplier = schedules.lr_multiplier(self.step_count, self.total_steps, self.config)
        return {kind: settings.lr * multiplier for kind, settings in self.settings.items()}

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Take the fp32 weights from the model again, e.g. after loading weights without optimizer state."""
        self.engine.optimizer.refresh_fp32_params()

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """State for megatron.core.dist_checkpointing, to save or to load into; collective."""
        return sharded_state.build(StateAsRows(self), model_sharded_state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `dist_checkpointing.load` returned for the result of `sharded_state_dict`; collective."""
        self.reload_model_params()
        rows = StateAsRows(self, empty=True)
        sharded_state.restore(rows, state_dict)
        rows.store()


class StateAsRows:
    """The optimizer's state as optim.sharded_state wants it: row blocks, in host memory.

    Args:
        empty: allocate the blocks only, to be filled and then stored.
    """

    def __init__(self, optimizer: ZeroOptimizer, empty: bool = False):
        self.optimizer, self.groups, self.step_count = optimizer, optimizer.groups, optimizer.step_count
        names = ("main_param", *MOMENTS) if optimizer.has_separate_main else MOMENTS
        self.blocks = []
        for name in names:
            for p in optimizer.parameters:
                rows = p.empty_rows(torch.float32) if empty else p.to_rows(self._reader(name), torch.float32)
                self.blocks.append((name, p, rows))

    def _reader(self, name: str):
        """Reads a stretch of one state from DeepSpeed's flat tensors."""
        if name == "main_param":
            return lambda stretch: stretch.of(stretch.flat)
        return lambda stretch: stretch.of(self.optimizer.adamw.state[stretch.flat][name])

    def state_tensors(self) -> list[tuple[str, ZeroParameter, Tensor]]:
        """As BovOptimizer's."""
        return [block for block in self.blocks if block[1].has_rows]

    def second_moments(self) -> list:
        """None: they are Muon's."""
        return []

    def store(self) -> None:
        """Put the blocks' values where DeepSpeed has them; collective."""
        for name, p, rows in self.blocks:
            p.from_rows(rows, self._reader(name), torch.float32)
        self.optimizer.step_count = self.step_count
