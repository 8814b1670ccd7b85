"""The engine on Megatron-core's data-parallel wrapper and schedules, with the optimizer of `optim`.

Shapes: see base.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from bov_megatron.engines import data_parallel
from bov_megatron.engines.base import Engine
from bov_megatron.engines.gradient_owners import GradientOwners
from bov_megatron.engines.host_rows import HostRows, hidden_from_megatron, trained_host_tables
from bov_megatron.model import context_parallel
from bov_megatron.model.bank import lookup_ahead
from bov_megatron.model.prefix import first_position
from bov_megatron.optim.optimizer import BovOptimizer, UpdateResult
from bov_megatron.parallel.device import device, to_device
from bov_megatron.parallel.timer import DeviceTimer
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.quantities import total_steps


class MegatronEngine(Engine):
    """Model, gradients and optimizer of one rank, on Megatron-core's data-parallel wrapper and schedules.

    Call parallel.process_groups.initialize first. Weights are initialised from the recipe's seed.

    Args:
        recipe: the run.
        with_optimizer: False for evaluation or conversion only.
    """

    def __init__(self, recipe: Recipe, with_optimizer: bool = True):
        super().__init__(recipe)
        self.wrapped = []
        self.gradient_owners: GradientOwners | None = None
        """None where gradients are all-reduced: every rank updates all rows."""
        self._gradient_timer = DeviceTimer()
        if with_optimizer:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            several = group.size() > 1
            scatter = recipe.parallel.use_distributed_optimizer and several
            tables = trained_host_tables(self.chunks)
            with hidden_from_megatron(tables):
                self.wrapped = data_parallel.wrap(
                    self.chunks, recipe.parallel.overlap_grad_reduce and several, scatter, self._finalize_gradients
                )
            self.optimizer = BovOptimizer(self.local_parameters(), recipe, total_steps(recipe), self.chunks)
            if scatter:
                self.gradient_owners = GradientOwners(self.wrapped, self.optimizer.parameters, group)
            of_host_tables = [p.assignment for p in self.optimizer.parameters if p.local.on_host]
            sharded = any(not assignment.replicated for assignment in of_host_tables)
            self.host_rows = HostRows(tables, group, sharded)

    def finish_gather(self) -> None:
        """See Engine; with `parallel.overlap_param_gather`, weights arrive during the next forward pass."""
        if self.optimizer is not None:
            self.optimizer.finish_gather()

    @property
    def gradient_seconds(self) -> float | None:
        """See Engine; None on later pipeline stages: the first one waits for them."""
        if parallel_state.get_pipeline_model_parallel_rank() > 0:
            return None
        return self._gradient_timer.seconds()

    def forward_backward(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """See Engine; gradients are left in `main_grad`, of the rows that this rank updates."""
        self._gradient_timer.start()
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self.host_rows.begin(micro_batches)

        def mean_loss(labels_BT: Tensor, counted_B: None, loss_BT: Tensor):
            loss = loss_BT.mean()
            # The schedule multiplies the loss by the context-parallel size and divides by the micro-batches, in place.
            return loss / parallel_state.get_context_parallel_world_size(), loss.detach().clone()

        losses = self._run(self.wrapped, micro_batches, mean_loss)
        lookup_ahead.check_settled()
        return self._sum_over_data_parallel(losses, 1).squeeze(0) / (
            len(micro_batches) * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        )

    def table_sums(self, table: Any, rows: int) -> tuple[float, int]:
        """See Engine; every data-parallel rank has the whole table, and its own rows' gradients."""
        (shard,) = (p for p in self.optimizer.parameters if p.local.parameter is table)
        own = shard.row_gradient()[: max(0, rows - shard.rows[0])]
        touched = (own != 0).any(dim=1).sum().to(device())
        if not shard.assignment.replicated:
            dist.all_reduce(touched, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return float(table.detach()[:rows].double().square().sum()), int(touched)

    def gradient_norm(self) -> Tensor:
        return self.optimizer.gradient_norm()

    def update(self, gradient_norm: float | None = None) -> UpdateResult:
        return self.optimizer.step(gradient_norm)

    def discard_gradients(self) -> None:
        """See Engine. The next `forward_backward` clears the buffers."""

    def _finalize_gradients(self, *arguments, **options) -> None:
        """Reduce gradients after the last backward pass: Megatron's, and those of tables in host memory."""
        self._gradient_timer.stop()
        finalize_model_grads(*arguments, **options)
        if self.gradient_owners is not None:
            self.gradient_owners.send()
        self.host_rows.reduce()

    def _fill_groups(self, micro_batches: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[list, list]:
        """An interleaved pipeline takes a multiple of its stages: append micro-batches that don't count."""
        missing = -len(micro_batches) % self.recipe.parallel.pipeline_model_parallel_size
        if len(self.chunks) == 1:
            missing = 0
        empty = torch.zeros_like(counted[-1])
        return [*micro_batches, *[micro_batches[-1]] * missing], [*counted, *[empty] * missing]

    def _run(self, chunks, micro_batches, loss_function, counted=None, with_labels=True, prefix=None):
        """See Engine; runs Megatron's schedule."""
        group = parallel_state.get_context_parallel_group()

        def forward_step(iterator, chunk):
            ids, counted_B = next(iterator)  # on the CPU: its distinct ids are computed without waiting for the GPU
            labels = to_device(context_parallel.take(ids[:, 1:], 1, group).contiguous()) if with_labels else None
            return chunk(ids[:, :-1].contiguous(), labels, prefix), functools.partial(loss_function, labels, counted_B)

        masks = counted or [None] * len(micro_batches)
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[zip(micro_batches, masks, strict=True) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].size(1) - 1 - first_position(prefix),
            micro_batch_size=micro_batches[0].size(0),
            forward_only=counted is not None,
        )
