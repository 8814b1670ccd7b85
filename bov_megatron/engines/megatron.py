"""The Megatron-core engine: builds the model on this rank and executes steps.

Shapes: B micro-batch, T sequence length. Micro-batches are token ids `[B, T+1]`: inputs `[:, :-1]`, targets
`[:, 1:]`. Every rank that shares a data-parallel rank is given the same micro-batches, on every pipeline stage:
a stage that hosts a bank looks values up by token id. So is every context-parallel rank, which cuts its part out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from bov_megatron.engines import data_parallel
from bov_megatron.model import context_parallel
from bov_megatron.model.decoder import BovModel
from bov_megatron.model.initialization import initialize_weights
from bov_megatron.model.naming import LocalParameter, local_parameters
from bov_megatron.optim.optimizer import BovOptimizer
from bov_megatron.parallel import cpu
from bov_megatron.parallel.timer import DeviceTimer
from bov_megatron.plan import total_steps
from bov_megatron.recipe import Recipe


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean cross-entropy of the global batch, nats per token, before the update."""
    gradient_norm: float
    """`nan` where it was not finite or not needed."""
    updated: bool
    """False if gradients were not finite or the loss was not accepted: weights and optimizer state are untouched."""


@dataclass(frozen=True)
class ScoreResult:
    """Validation sums over all data-parallel ranks; the same on every rank."""

    nats: float
    bytes: int
    tokens: int
    """Targets that count: special tokens count neither nats nor bytes."""


class MegatronEngine:
    """Model, gradients and optimizer of one rank, on Megatron-core's data-parallel wrapper and schedules.

    Call parallel.process_groups.initialize first. Weights are initialised from the recipe's seed.

    Args:
        recipe: the run.
        with_optimizer: False for evaluation or conversion only.
    """

    def __init__(self, recipe: Recipe, with_optimizer: bool = True):
        self.recipe = recipe
        self._chunks = _build_chunks(recipe)
        self.wrapped, self.optimizer = [], None
        self._gradient_timer = DeviceTimer()
        if with_optimizer:
            self.wrapped = data_parallel.wrap(
                self._chunks, recipe.parallel.overlap_grad_reduce, before_reduction=self._gradient_timer.stop
            )
            self.optimizer = BovOptimizer(self.wrapped, recipe, total_steps(recipe))

    @property
    def chunks(self) -> list[BovModel]:
        """This pipeline stage's model: one chunk, or several of an interleaved pipeline.

        Ask each time that weights are read: updated ones may arrive in the course of the next forward pass only
        (`parallel.overlap_param_gather`), and this waits for them.
        """
        if self.optimizer is not None:
            self.optimizer.finish_gather()
        return self._chunks

    @property
    def model(self) -> BovModel:
        """This pipeline stage's model where it is one chunk, as it is unless the pipeline is interleaved."""
        (chunk,) = self.chunks
        return chunk

    @property
    def gradient_seconds(self) -> float | None:
        """From the start of the last `forward_backward` until gradients were ready for their reduction over
        data-parallel ranks; None on later pipeline stages, which the first one waits for."""
        if parallel_state.get_pipeline_model_parallel_rank() > 0:
            return None
        return self._gradient_timer.seconds()

    def local_parameters(self) -> list[LocalParameter]:
        """Every parameter of this rank."""
        return [local for chunk in self.chunks for local in local_parameters(chunk)]

    def model_sharded_state_dict(self, metadata: dict) -> dict:
        """This rank's weights for megatron.core.dist_checkpointing, by chunk; Megatron changes `metadata`."""
        return {
            str(number): chunk.sharded_state_dict(metadata=dict(metadata)) for number, chunk in enumerate(self.chunks)
        }

    def train_step(
        self, micro_batches: Sequence[Tensor], accept: Callable[[float], bool] = lambda loss: True
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        Args:
            micro_batches: this data-parallel rank's share of the global batch, each `[B, T+1]`.
            accept: called with the loss before the update; False, on all ranks alike, leaves the update out.
        """
        loss = self.forward_backward(micro_batches)
        if not accept(loss):
            return StepResult(loss, math.nan, False)
        update = self.optimizer.step()
        return StepResult(loss, update.grad_norm, update.applied)

    def forward_backward(self, micro_batches: Sequence[Tensor]) -> float:
        """Leave the global batch's mean gradient in `main_grad`; return its mean loss in nats per token."""
        self._gradient_timer.start()
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()

        def mean_loss(labels_BT: Tensor, loss_BT: Tensor):
            loss = loss_BT.mean()
            # The schedule multiplies by the context-parallel ranks and divides by the micro-batches, in place.
            return loss / parallel_state.get_context_parallel_world_size(), loss.detach().clone()

        losses = self._run(self.wrapped, micro_batches, mean_loss, forward_only=False)
        return self._sum_over_data_parallel(losses, 1)[0] / (
            len(micro_batches) * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        )

    @torch.no_grad()
    def score(self, micro_batches: Sequence[Tensor], bytes_per_token: Tensor, counted: Sequence[Tensor]) -> ScoreResult:
        """Nats and bytes of held-out micro-batches, without gradients.

        Args:
            micro_batches: this data-parallel rank's, each `[B, T+1]`; every rank passes equally many.
            bytes_per_token: UTF-8 bytes of each token id, 0 for special tokens, `[vocab_size]`.
            counted: per micro-batch, True for the rows that count `[B]` (padding rows don't).
        """
        for chunk in self.chunks:
            chunk.eval()
        micro_batches, counted = self._fill_groups(micro_batches, counted)
        masks = iter(counted)

        def sums(labels_BT: Tensor, loss_BT: Tensor):
            sizes = bytes_per_token[labels_BT] * next(masks).to(labels_BT.device)[:, None]
            nats = (loss_BT.double() * (sizes > 0)).sum()
            return loss_BT.mean(), torch.stack([nats, sizes.sum().double(), (sizes > 0).sum().double()])

        results = self._run(self.chunks, micro_batches, sums, forward_only=True)
        nats, size, tokens = self._sum_over_data_parallel(results, 3)
        return ScoreResult(nats, int(size), int(tokens))

    def load_state(self, model_state: dict, optimizer_state: dict | None) -> None:
        """Take loaded weights and, with an optimizer, its state (see training/checkpoint.py)."""
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(model_state[str(number)])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(optimizer_state)

    def _fill_groups(self, micro_batches: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[list, list]:
        """An interleaved pipeline takes micro-batches in groups of its stages: add some that count nothing."""
        missing = -len(micro_batches) % self.recipe.parallel.pipeline_model_parallel_size
        if len(self.chunks) == 1:
            missing = 0
        empty = torch.zeros_like(counted[-1])
        return [*micro_batches, *[micro_batches[-1]] * missing], [*counted, *[empty] * missing]

    def _run(self, chunks: list, micro_batches: Sequence[Tensor], loss_function, forward_only: bool) -> list[Tensor]:
        """Megatron's schedule over the micro-batches; what `loss_function(labels, losses)` gave beside the loss."""
        group = parallel_state.get_context_parallel_group()

        def forward_step(iterator, chunk):
            ids = next(iterator).to(cpu.device(), non_blocking=True)
            labels = context_parallel.take(ids[:, 1:], 1, group).contiguous()
            return chunk(ids[:, :-1].contiguous(), labels), functools.partial(loss_function, labels)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=self.recipe.model.sequence_length,
            micro_batch_size=micro_batches[0].size(0),
            forward_only=forward_only,
        )

    def _sum_over_data_parallel(self, results: list[Tensor], width: int) -> list[float]:
        """Sum of the last stage's results over micro-batches, data- and context-parallel ranks, on every rank."""
        total = torch.zeros(width, dtype=torch.float64, device=cpu.device())
        if results:
            total += torch.stack(results).double().reshape(-1, width).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return total.tolist()


def _build_chunks(recipe: Recipe) -> list[BovModel]:
    """This pipeline stage's model chunks, with initial weights."""
    chunks = []
    for number in range(recipe.parallel.virtual_pipeline_model_parallel_size):
        chunk = BovModel(
            recipe,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            vp_stage=None if recipe.parallel.virtual_stages is None else number,
        )
        initialize_weights(chunk)
        chunks.append(chunk)
    return chunks
