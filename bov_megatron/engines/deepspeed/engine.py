"""The DeepSpeed engine: ZeRO 1, 2 and 3 over the same model, with Megatron's tensor parallelism for 1 and 2.

DeepSpeed's "model parallel" ranks are the tensor-parallel ranks here. Everything that uses internals of DeepSpeed is in
`engines/deepspeed` and written for version 0.19.8. Shapes: see ../base.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import logger
from megatron.core import parallel_state
from torch import Tensor

from bov_megatron.engines.base import Engine
from bov_megatron.engines.deepspeed.optimizer import ZeroOptimizer
from bov_megatron.engines.deepspeed.state import Stretch, ZeroParameter
from bov_megatron.model.bank import lookup_ahead
from bov_megatron.optim import sharded_state
from bov_megatron.optim.adamw import make_adamw
from bov_megatron.optim.groups import group_settings
from bov_megatron.optim.optimizer import UpdateResult
from bov_megatron.parallel.device import device, has_gpu, to_device
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.memory import ZERO3_LIVE_ELEMENTS
from bov_megatron.recipe.quantities import total_steps

BUCKET_ELEMENTS = 2**26
"""Gradient elements that DeepSpeed reduces at once, through a buffer of this size."""
PERSISTENT_ELEMENTS = 10**5
"""ZeRO 3 keeps parameters up to this size whole on every rank."""


class DeepSpeedEngine(Engine):
    """Model, gradients and optimizer of one rank, on DeepSpeed's ZeRO; AdamW for all parameters.

    Call parallel.process_groups.initialize first. Weights are initialised from the recipe's seed, like the Megatron
    engine's.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.zero_parameters = [ZeroParameter(local, group) for local in self.model.local_parameters]
        self._by_identity = {id(p.local.parameter): p for p in self.zero_parameters}
        for p in self.zero_parameters:
            # DeepSpeed's gradient norm reads this attribute, to count replicated parameters once. Megatron's optimizers
            # read it too, but are not used here.
            p.local.parameter.tensor_model_parallel = p.local.partition_dim >= 0
        _quiet_deepspeed()
        with _device_number_as_local_rank():
            self.zero, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=make_adamw(
                    [(p.local.kind, p.local.parameter) for p in self.zero_parameters],
                    group_settings(recipe),
                    recipe.optimizer.eps,
                ),
                mpu=_ModelParallelUnit(),
                config=zero_config(recipe),
                dist_init_required=False,
            )
        self.optimizer = ZeroOptimizer(self.zero, self.zero_parameters, recipe, total_steps(recipe))
        self._touched: dict[int, tuple[int, Tensor]] = {}
        """By table: first row of this rank's range of elements, and which of the rows from there have a gradient."""

    def forward_backward(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """See Engine; DeepSpeed holds the gradients."""
        self.zero.train()

        def mean_loss(labels_BT: Tensor, counted_B: None, loss_BT: Tensor):
            loss = loss_BT.mean()
            return loss, loss.detach()

        losses = self._run(self.chunks, micro_batches, mean_loss)
        lookup_ahead.check_settled()
        self._note_touched_rows()
        return self._sum_over_data_parallel(losses, 1).squeeze(0) / (
            len(micro_batches) * parallel_state.get_data_parallel_world_size()
        )

    def _run(self, chunks, micro_batches, loss_function, counted=None, with_labels=True, prefix=None):
        results = []
        masks = counted or [None] * len(micro_batches)
        for number, (ids_BT, counted_B) in enumerate(zip(micro_batches, masks, strict=True), 1):
            labels_BT = to_device(ids_BT[:, 1:].contiguous()) if with_labels else None
            if counted is None:
                self.zero.set_gradient_accumulation_boundary(number == len(micro_batches))
            losses_BT = self.zero(ids_BT[:, :-1].contiguous(), labels_BT, prefix)
            loss, result = loss_function(labels_BT, counted_B, losses_BT)
            if counted is None:
                self.zero.backward(loss / len(micro_batches), scale_wrt_gas=False)
            results.append(result)
        return results

    def gradient_norm(self) -> None:
        """See Engine. None: DeepSpeed computes the norm in its own step."""

    def update(self, gradient_norm: float | None = None) -> UpdateResult:
        return self.optimizer.step()

    def discard_gradients(self) -> None:
        self.optimizer.discard()

    @torch.no_grad()
    def _note_touched_rows(self) -> None:
        self._touched = {}
        for p in self.zero_parameters:
            if p.local.kind == "table" and p.stretch is not None:
                width, start = p.shape[1], p.stretch.start
                # Pad to whole rows: the first and the last may be shared with another rank.
                missing = (start % width, -p.stretch.stop % width)
                has_gradient = torch.nn.functional.pad(self.optimizer.gradient(p, p.stretch) != 0, missing).view(
                    -1, width
                )
                self._touched[id(p.local.parameter)] = start // width, has_gradient.any(dim=1)

    @torch.no_grad()
    def table_sums(self, table: torch.nn.Parameter, rows: int) -> tuple[float, int]:
        """See Engine. A row may be split between two ranks."""
        p = self._by_identity[id(table)]
        touched = torch.zeros(p.shape[0], dtype=torch.int32, device=device())
        if id(table) in self._touched:
            first, mask = self._touched[id(table)]
            touched[first : first + mask.numel()] = mask.to(touched)
        dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=p.group)
        squares = torch.zeros((), dtype=torch.float64, device=device())
        if p.stretch is not None:
            inside = max(0, min(p.stretch.stop, rows * p.shape[1]) - p.stretch.start)
            squares += self.weights_of(p)(p.stretch)[:inside].double().square().sum()
        dist.all_reduce(squares, group=p.group)
        return squares.item(), int(touched[:rows].sum())

    def sharded_state_dict(self, metadata: dict) -> dict:
        """See Engine. Under ZeRO 3 weights are stored as rows too, like optimizer state: no rank has all of them."""
        if not self.partitions_weights:
            return super().sharded_state_dict(metadata)
        with self._whole_shapes():
            state = super().sharded_state_dict(metadata)
        (chunk,) = state["model"].values()
        for p in self.zero_parameters:
            name = p.local.qualified_name
            block, like = p.to_rows(self.weights_of(p), p.dtype), chunk.pop(name)
            if p.has_rows:
                chunk[name] = sharded_state.rows_of(p, block, like, like.key)
        return state

    @torch.no_grad()
    def load_state(self, model_state: dict, optimizer_state: dict | None) -> None:
        """See Engine; collective under ZeRO 3."""
        if not self.partitions_weights:
            super().load_state(model_state, optimizer_state)
            return
        for p in self.zero_parameters:
            p.from_rows(model_state["0"].get(p.local.qualified_name), self.weights_of(p), p.dtype)
        self.optimizer.gather_persistent()
        self.optimizer.load_state_dict(optimizer_state)

    @property
    def partitions_weights(self) -> bool:
        return self.recipe.deepspeed.zero_stage == 3

    def weights_of(self, p: ZeroParameter) -> Callable[[Stretch], Tensor]:
        """A function that returns this rank's stretch of a parameter, in the model's precision."""
        if self.partitions_weights:
            return lambda stretch: p.local.parameter.ds_tensor.detach()[: stretch.stop - stretch.start]
        return lambda stretch: p.local.parameter.detach().view(-1)[stretch.start : stretch.stop]

    @contextlib.contextmanager
    def _whole_shapes(self):
        """ZeRO 3: give the parameters their full shapes, without values, for sharded state dicts."""
        held = [p.local.parameter.data for p in self.zero_parameters]
        try:
            for p in self.zero_parameters:
                p.local.parameter.data = torch.zeros((), dtype=p.dtype, device=device()).expand(p.shape)
            yield
        finally:
            for p, data in zip(self.zero_parameters, held, strict=True):
                p.local.parameter.data = data


def zero_config(recipe: Recipe) -> dict:
    """DeepSpeed's configuration for the recipe."""
    train, bf16 = recipe.train, recipe.train.precision == "bf16"
    zero: dict[str, Any] = {
        "stage": recipe.deepspeed.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        "stage3_max_live_parameters": ZERO3_LIVE_ELEMENTS,
        "stage3_max_reuse_distance": ZERO3_LIVE_ELEMENTS,
    }
    if recipe.deepspeed.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu()}
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed would compile its own; torch's fused AdamW runs on CPUs too
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": recipe.optimizer.clip_grad,
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device at every micro-batch
    }


@contextlib.contextmanager
def _device_number_as_local_rank():
    # DeepSpeed uses LOCAL_RANK as the device number, which is wrong where Slurm shows each task only its own GPU.
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device().index or 0)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _quiet_deepspeed() -> None:
    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__ = {}  # on a CPU, DeepSpeed would compile a collective that is never called
    bf16_optimizer.see_memory_usage = lambda message, force=False: None  # prints and collects garbage for every group


class _ModelParallelUnit:
    """Megatron's process groups under DeepSpeed's names."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
