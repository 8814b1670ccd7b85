"""The interface of the engines, and what they have in common.

Shapes: B micro-batch, T sequence length. Micro-batches are token ids `[B, T+1]`: inputs `[:, :-1]`, targets `[:, 1:]`.
All ranks of a model replica get the same micro-batches: every pipeline stage with a bank looks values up by token id,
and every context-parallel rank takes its part of the sequence.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from bov_megatron.model import context_parallel
from bov_megatron.model.decoder import BovModel
from bov_megatron.model.initialization import initialize_weights
from bov_megatron.model.prefix import Prefix, first_position
from bov_megatron.optim.optimizer import UpdateResult
from bov_megatron.parallel import regions
from bov_megatron.parallel.device import device, to_device
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import Recipe


@dataclass(frozen=True)
class StepResult:
    """Result of one step; the same on every rank."""

    loss: float
    """Mean cross-entropy of the global batch, nats per token, before the update."""
    gradient_norm: float
    updated: bool


@dataclass(frozen=True)
class ScoreResult:
    """Validation sums over all data-parallel ranks; the same on every rank."""

    nats: float
    bytes: int
    tokens: int
    """Targets, without special tokens, which count neither nats nor bytes."""

    @staticmethod
    def of(sums: Tensor) -> ScoreResult:
        """From `Engine.score_sums`, or a sum of such; waits for the device."""
        nats, size, tokens = sums.tolist()
        return ScoreResult(nats, int(size), int(tokens))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


class Engine(abc.ABC):
    """Model, gradients and optimizer of one rank.

    `optimizer` is None for evaluation, else has the methods `step`, `learning_rates`, `sharded_state_dict`,
    `load_state_dict` and `reload_model_params` and the attribute `step_count` of optim.optimizer.BovOptimizer.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.optimizer: Any = None
        self.chunks = _build_chunks(recipe)
        """This pipeline stage's model: one chunk, or several of an interleaved pipeline."""

    @property
    def gradient_seconds(self) -> float | None:
        """Time from the start of the last `forward_backward` until this rank's gradients were ready to be reduced over
        data-parallel ranks; None where it is not measured."""
        return None

    @property
    def partitions_weights(self) -> bool:
        """Whether data-parallel ranks hold parts of the weights, and gather them in each forward pass: then all must do
        equally many."""
        return False

    @property
    def model(self) -> BovModel:
        """This pipeline stage's model; only where the pipeline is not interleaved."""
        (chunk,) = self.chunks
        return chunk

    def finish_gather(self) -> None:  # noqa: B027  nothing to wait for, unless an engine gathers weights in background
        """Wait until this rank has all weights of the last update. Call it before reading weights outside a forward
        pass, and before writing them; on all data-parallel ranks, which bring each other rows of tables in host
        memory."""

    def local_parameters(self) -> list[LocalParameter]:
        """Every parameter of this rank, with the last update's weights (see `finish_gather`)."""
        self.finish_gather()
        return [local for chunk in self.chunks for local in chunk.local_parameters]

    @abc.abstractmethod
    def forward_backward(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """Compute the global batch's mean gradient, for `update`.

        Args:
            micro_batches: this data-parallel rank's share of the global batch, each `[B, T+1]`.

        Returns the global batch's mean loss in nats per token, a 0-dim fp64 tensor on the device, without waiting for
        it.
        """

    @abc.abstractmethod
    def gradient_norm(self) -> Tensor | None:
        """Global L2 norm of the gradients, a 0-dim fp64 tensor on the device, `nan` if any element is not finite;
        collective. None where only `update` computes it."""

    @abc.abstractmethod
    def update(self, gradient_norm: float | None = None) -> UpdateResult:
        """One optimizer step from the current gradients, left out where they are not finite; collective.

        Args:
            gradient_norm: value of `gradient_norm()`, if it is known.
        """

    @abc.abstractmethod
    def discard_gradients(self) -> None:
        """Drop the current gradients without an update; collective."""

    def train_step(self, micro_batches: Sequence[Tensor]) -> StepResult:
        """Forward, backward and update, without the trainer's checks in between."""
        loss, norm = self.forward_backward(micro_batches), self.gradient_norm()
        loss, *known_norm = torch.stack([loss] if norm is None else [loss, norm]).tolist()  # waits once, for both
        result = self.update(*known_norm)
        return StepResult(loss, result.grad_norm, result.applied)

    def score(self, micro_batches: Sequence[Tensor], bytes_per_token: Tensor, counted: Sequence[Tensor]) -> ScoreResult:
        """`score_sums`, waited for."""
        return ScoreResult.of(self.score_sums(micro_batches, bytes_per_token, counted))

    @torch.no_grad()
    def score_sums(self, micro_batches: Sequence[Tensor], bytes_per_token: Tensor, counted: Sequence[Tensor]) -> Tensor:
        """Nats, bytes and tokens of held-out micro-batches, without gradients: fp64 `[3]` on the device, without
        waiting for it.

        Args:
            micro_batches: this data-parallel rank's, each `[B, T+1]`; every rank passes equally many.
            bytes_per_token: UTF-8 bytes of each token id, 0 for special tokens, `[vocab_size]`.
            counted: per micro-batch, `[B]`, False for padding rows, which are not scored.
        """
        self.finish_gather()
        for chunk in self.chunks:
            chunk.eval()
        micro_batches, counted = self._fill_groups(micro_batches, counted)

        def sums(labels_BT: Tensor, counted_B: Tensor, loss_BT: Tensor):
            sizes = bytes_per_token[labels_BT] * to_device(counted_B)[:, None]
            nats = (loss_BT.double() * (sizes > 0)).sum()
            return loss_BT.mean(), torch.stack([nats, sizes.sum().double(), (sizes > 0).sum().double()])

        results = self._run(self.chunks, micro_batches, sums, counted)
        return self._sum_over_data_parallel(results, 3)

    @torch.no_grad()
    def next_logits(self, ids_BT: Tensor, lengths_B: Tensor, prefix: Prefix | None = None) -> Tensor:
        """Logits of the token that follows the first `lengths_B` ids of each row.

        Args:
            ids_BT: the same on all ranks of a model replica; what follows the counted ids is ignored.
            lengths_B: at least 1, and more than the prefix's.
            prefix: of these rows (see `prefix`); None computes all of them.

        Returns fp32 `[B, vocab_size]`, the same on all ranks of a model replica; collective.
        """
        first = first_position(prefix)
        padded = self._padded(F.pad(ids_BT, (0, 1)), first)  # micro-batches have T + 1 ids
        vocab_size = self.recipe.model.vocab_size
        return self._infer(
            padded,
            lambda logits_BsV: _logits_at(logits_BsV, lengths_B - 1, padded.size(1) - 1, first)[:, :vocab_size],
            (len(ids_BT), vocab_size),
            prefix,
        )

    @torch.no_grad()
    def token_scores(self, ids_BT: Tensor, unscored: int = 1) -> tuple[Tensor, Tensor]:
        """Nats of the tokens behind the first `unscored` of each row, and whether each is the most probable one.

        What rows have in common before that is computed once, and logits only from there on.

        Args:
            ids_BT: the same on all ranks of a model replica.
            unscored: at least 1.

        Returns fp32 and bool, `[B, T - unscored]` on the CPU, the same on all ranks of a model replica; collective over
        them.
        """
        prefix = self.prefix(ids_BT, unscored - 1)
        first = first_position(prefix)
        padded = self._padded(ids_BT, first)
        scores_2BT = self._infer(
            padded,
            lambda logits_BsV: _token_scores(logits_BsV, padded[:, 1:].to(logits_BsV.device), first),
            (2, len(ids_BT), padded.size(1) - 1 - first),
            prefix,
        )
        nats_BT, greedy_BT = scores_2BT[..., unscored - 1 - first : ids_BT.size(1) - 1 - first].cpu()
        return nats_BT, greedy_BT.bool()

    @torch.no_grad()
    def prefix(self, ids_BT: Tensor, length: int) -> Prefix | None:
        """What the rows begin with, computed once for rows that begin alike; collective over a model replica's ranks.

        Args:
            length: how many ids of each row; fewer are taken where the layout needs multiples.

        None where none are left, or this engine's passes can't differ between data-parallel ranks.
        """
        length -= length % self._length_multiple
        if length == 0 or self.partitions_weights:
            return None
        ids_QP, rows_B = ids_BT[:, :length].unique(dim=0, return_inverse=True)
        prefix = Prefix()
        self._infer(F.pad(ids_QP, (0, 1)), lambda hidden_sQH: torch.zeros(1, device=device()), (1,), prefix)
        prefix.begin(length, to_device(rows_B))
        return prefix

    def _infer(
        self,
        ids_BT: Tensor,
        function: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        prefix: Prefix | None = None,
    ) -> Tensor:
        """`function` of the last stage's logits, fp32 of `shape`, on every rank of a model replica; collective."""
        self.finish_gather()
        for chunk in self.chunks:
            chunk.eval()
        micro_batches, counted = self._fill_groups([ids_BT], [torch.ones(len(ids_BT), dtype=torch.bool)])
        with regions.uncompiled():
            results = self._run(
                self.chunks,
                micro_batches,
                lambda labels, counted_B, logits_BsV: (logits_BsV.new_zeros(()), function(logits_BsV)),
                counted,
                with_labels=False,
                prefix=prefix,
            )
        result = results[0].contiguous() if results else torch.empty(shape, device=device())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(result, last, group=parallel_state.get_pipeline_model_parallel_group())
        return result

    @abc.abstractmethod
    def table_sums(self, table: torch.nn.Parameter, rows: int) -> tuple[float, int]:
        """Sum of squares of the first `rows` rows of this rank's part of a value table, and how many of them have a
        gradient; collective over data-parallel ranks, the same on all of them."""

    def sharded_state_dict(self, metadata: dict) -> dict:
        """This rank's weights, by chunk, and optimizer state, for megatron.core.dist_checkpointing; collective."""
        self.finish_gather()
        model = {  # a copy of metadata, which Megatron modifies
            str(number): chunk.sharded_state_dict(metadata=dict(metadata)) for number, chunk in enumerate(self.chunks)
        }
        if self.optimizer is None:
            return {"model": model}
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model)}

    def load_state(self, model_state: dict, optimizer_state: dict | None) -> None:
        """Set weights and, with an optimizer, its state from a loaded checkpoint (see checkpoint/loading.py)."""
        self.finish_gather()  # a pending gather would overwrite the loaded weights
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(model_state[str(number)])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(optimizer_state)

    @property
    def _length_multiple(self) -> int:
        """Of how many positions a pass takes multiples: they are split among tensor- and context-parallel ranks, and
        FP8 needs multiples of 16."""
        recipe, layout = self.recipe, self.recipe.parallel
        if layout.context_parallel_size == 1 and not layout.sequence_parallel and recipe.train.fp8 == "none":
            return 1
        return 32 * layout.context_parallel_size * layout.tensor_model_parallel_size

    def _padded(self, ids_BT: Tensor, first: int = 0) -> Tensor:
        """A micro-batch of any length as one whose inputs from `first` on the layout takes. Causal attention makes what
        is appended harmless."""
        inputs, multiple = ids_BT.size(1) - 1, self._length_multiple
        length = first + math.ceil((inputs - first) / multiple) * multiple
        if multiple > 1:
            length = min(length, self.recipe.model.sequence_length)
        return F.pad(ids_BT, (0, length - inputs))

    def _fill_groups(self, micro_batches: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[list, list]:
        """Micro-batches and `counted`, padded to a number that the schedule accepts."""
        return list(micro_batches), list(counted)

    @abc.abstractmethod
    def _run(
        self,
        chunks: list,
        micro_batches: Sequence[Tensor],
        loss_function: Callable[[Any, Any, Tensor], tuple[Tensor, Tensor]],
        counted: Sequence[Tensor] | None = None,
        with_labels: bool = True,
        prefix: Prefix | None = None,
    ) -> list[Tensor]:
        """Forward, and backward unless `counted` is given, of all micro-batches; behind a prefix, of one.

        Returns, on the last pipeline stage, the second results of `loss_function(labels, counted, losses)`; the first
        is the loss. Without labels, the function gets None in their place, and logits instead of losses.
        """

    def _sum_over_data_parallel(self, results: list[Tensor], width: int) -> Tensor:
        """Sum of the last stage's results over micro-batches, data- and context-parallel ranks, on every rank."""
        total = torch.zeros(width, dtype=torch.float64, device=device())
        if results:
            total += torch.stack(results).double().reshape(-1, width).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return total


def _logits_at(logits_BsV: Tensor, positions_B: Tensor, length: int, first: int) -> Tensor:
    """Whole rows of logits `[B, V]` at one position of each sequence, from this rank's part of the positions `first` to
    `length` and of the vocabulary; collective over the context- and tensor-parallel ranks of a stage."""
    context, tensor = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    held_s = context_parallel.positions(length, context, logits_BsV.device, first)
    is_here_Bs = held_s == positions_B.to(held_s)[:, None]
    rows = torch.arange(len(logits_BsV), device=logits_BsV.device)
    picked = logits_BsV[rows, is_here_Bs.int().argmax(dim=1)].float()
    picked = torch.where(is_here_Bs.any(dim=1, keepdim=True), picked, 0.0)
    if context.size() > 1:
        dist.all_reduce(picked, group=context)
    parts = [torch.empty_like(picked) for _ in range(tensor.size())]
    dist.all_gather(parts, picked.contiguous(), group=tensor)
    return torch.cat(parts, dim=1)


def _token_scores(logits_BsV: Tensor, ids_BT: Tensor, first: int) -> Tensor:
    """Nats of each token from `first` on and whether it is the most probable one (the lowest id among equals),
    `[2, B, T - first]`, from this rank's part of sequence and vocabulary; collective over the context- and
    tensor-parallel ranks of a stage."""
    context = parallel_state.get_context_parallel_group()
    held_s = context_parallel.positions(ids_BT.size(1), context, ids_BT.device, first)
    scores_2Bs = _held_token_scores(logits_BsV, ids_BT[:, held_s])
    if context.size() == 1:
        return scores_2Bs
    scores_2BT = scores_2Bs.new_zeros(2, len(ids_BT), ids_BT.size(1) - first)
    scores_2BT[..., held_s - first] = scores_2Bs
    dist.all_reduce(scores_2BT, group=context)
    return scores_2BT


def _held_token_scores(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """`_token_scores` of the positions that this rank holds."""
    group = parallel_state.get_tensor_model_parallel_group()
    width = logits_BTV.size(-1)
    highest_BT, best_BT = logits_BTV.max(dim=-1)
    extremes = torch.stack([highest_BT.double(), (best_BT + group.rank() * width).double()])  # ids are exact in fp64
    parts = [torch.empty_like(extremes) for _ in range(group.size())]
    dist.all_gather(parts, extremes, group=group)
    highest_RBT, best_RBT = torch.stack(parts, dim=1)
    highest_BT, first_BT = highest_RBT.max(dim=0)
    best_BT = best_RBT.gather(0, first_BT[None])[0].long()

    own_BT = ids_BT - group.rank() * width
    is_own_BT = (own_BT >= 0) & (own_BT < width)
    chosen_BT = logits_BTV.gather(-1, own_BT.clamp(0, width - 1)[..., None])[..., 0].double()
    sums = torch.stack(
        [(logits_BTV - highest_BT[..., None].float()).exp().sum(-1).double(), torch.where(is_own_BT, chosen_BT, 0.0)]
    )
    dist.all_reduce(sums, group=group)
    nats_BT = sums[0].log() + highest_BT - sums[1]
    return torch.stack([nats_BT, (best_BT == ids_BT).double()]).float()


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
