"""Megatron's data-parallel wrapper, for a model whose value tables write their gradients into the buffer themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from bov_megatron.model.decoder import BovModel
from bov_megatron.parallel.parameter import LocalParameter

BUCKET_ELEMENTS = None
"""Gradients that are reduced together while the backward pass goes on; None: Megatron's choice, 40 million or more."""


def wrap(chunks: Sequence[BovModel], overlap_grad_reduce: bool, finalize: Callable) -> list[DataParallel]:
    """Wrap the model chunks of this pipeline stage, and tell Megatron's schedules how to reduce their gradients.

    Args:
        overlap_grad_reduce: reduce a bucket as soon as the step's last micro-batch has left its gradients; on later
            pipeline stages, whose buckets are whole chunks, when the schedule says that all stages do.
        finalize: called after the last backward pass with the arguments of Megatron's `finalize_model_grads`.
    """

    wrapped = []
    for number, chunk in enumerate(chunks):
        # One each: Megatron writes the bucket size into it.
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap_grad_reduce, bucket_size=BUCKET_ELEMENTS
        )
        tables = [local for local in chunk.local_parameters if local.kind == "table"]
        wrapped.append(DataParallel(chunk.config, settings, chunk, tables, disable_bucketing=number > 0))
    config = chunks[0].config  # the one that schedules read
    config.no_sync_func = _each([one.no_sync for one in wrapped])
    if overlap_grad_reduce:
        config.grad_sync_func = _each([one.start_grad_sync for one in wrapped])
    config.finalize_model_grads_func = finalize
    return wrapped


def _each(functions: list):
    """As schedules want it: a list for an interleaved pipeline only."""
    return functions if len(functions) > 1 else functions[0]


class DataParallel(DistributedDataParallel):
    """Counts a table's gradient as ready when whoever wrote it says so (`parallel.parameter.gradient_ready`).

    Autograd has no gradient for a table. Megatron's hook would take that for an error where reduction overlaps with
    the backward pass, and a bucket reduced before the table's rows are in would be wrong without any.
    """

    def __init__(
        self,
        config,
        settings: DistributedDataParallelConfig,
        module: nn.Module,
        tables: Sequence[LocalParameter],
        disable_bucketing: bool,
    ):
        # Before Megatron's constructor, which makes the hooks below. Tables are special where reduction overlaps only.
        self._tables = {id(table.parameter): table for table in tables if settings.overlap_grad_reduce}
        super().__init__(config, settings, module, disable_bucketing)
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
