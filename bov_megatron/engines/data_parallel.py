"""Megatron's data-parallel wrapper for models whose value tables write their gradients without autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from bov_megatron.model.decoder import BovModel
from bov_megatron.model.weight_gradients import add_to_main_grad

BUCKET_ELEMENTS = None
"""Gradient elements reduced together during the backward pass; None is Megatron's default, at least 40 million."""


def wrap(
    chunks: Sequence[BovModel], overlap_grad_reduce: bool, reduce_scatter: bool, finalize: Callable
) -> list[DataParallel]:
    """Wrap the model chunks of this pipeline stage, and set the functions by which Megatron's schedules reduce their
    gradients.

    Args:
        overlap_grad_reduce: reduce a bucket as soon as it has the gradients of the step's last micro-batch; on later
            pipeline stages, where a bucket is a whole chunk, when the schedule starts it on all stages.
        reduce_scatter: leave only an equal part of each bucket's sum on a rank (see gradient_owners.py).
        finalize: called after the last backward pass with the arguments of Megatron's `finalize_model_grads`.
    """

    wrapped = []
    for number, chunk in enumerate(chunks):
        # A new config for each chunk: Megatron writes the bucket size into it.
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            use_distributed_optimizer=reduce_scatter,
            bucket_size=BUCKET_ELEMENTS,
        )
        wrapped.append(DataParallel(settings, chunk, disable_bucketing=number > 0))
        add_to_main_grad(chunk, chunk.config.params_dtype)
    config = chunks[0].config  # the one that schedules read
    config.no_sync_func = _each([chunk.no_sync for chunk in wrapped])
    if overlap_grad_reduce:
        config.grad_sync_func = _each([chunk.start_grad_sync for chunk in wrapped])
    config.finalize_model_grads_func = finalize
    return wrapped


def _each(functions: list):
    # Schedules take a list for an interleaved pipeline only.
    return functions if len(functions) > 1 else functions[0]


class DataParallel(DistributedDataParallel):
    """Where reduction overlaps with the backward pass, counts a value table's gradient as ready at
    `parallel.parameter.gradient_ready`.

    Autograd has no gradient for a table: Megatron's hook would raise, and reducing a bucket before the table's gradient
    is in it would silently give wrong gradients.
    """

    def __init__(self, settings: DistributedDataParallelConfig, module: BovModel, disable_bucketing: bool):
        overlap = settings.overlap_grad_reduce
        # Set before Megatron's constructor, which calls `_make_backward_post_hook`.
        self._tables = {id(p.parameter): p for p in module.local_parameters if overlap and p.kind == "table"}
        super().__init__(module.config, settings, module, disable_bucketing)
        for parameter, group in self.param_to_bucket_group.items():
            if id(parameter) in self._tables:
                parameter.on_gradient_ready = functools.partial(group.register_grad_ready, parameter)

    def _make_backward_post_hook(self, param: nn.Parameter):
        table = self._tables.get(id(param))
        if table is None:
            return super()._make_backward_post_hook(param)

        def refuse(*unused):
            if param.grad is not None:
                raise RuntimeError(
                    f"{table.names[0]}: its gradient came from autograd, but is expected in main_grad by "
                    "parallel.parameter.gradient_ready; set parallel.overlap_grad_reduce=false"
                )

        return refuse
