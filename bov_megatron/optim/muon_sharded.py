"""Muon on matrices that are split over tensor-parallel ranks, and that may be fused.

Orthogonalising a shard, or query and key together, would be a different optimizer. So each matrix has a worker among
the tensor-parallel ranks: it receives the parts of the direction, in bf16, updates the whole matrices as one process
does, and sends every rank its part of the update. The result does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.optim import muon
from bov_megatron.optim.parameter_shard import ParameterShard
from bov_megatron.optim.sharding import balance, group_rank, group_size
from bov_megatron.parallel.parameter import LocalParameter

GATHER_ELEMENTS = 32 * 1024 * 1024
"""Local elements that are sent to their workers at a time."""


def orthogonalisation_cost(local: LocalParameter) -> float:
    """Multiplications of one iteration, up to a constant factor; used to balance ranks."""
    return float(sum(rows * columns * min(rows, columns) for rows, columns in local.piece_shapes()))


class MuonMatrix:
    """Muon's state of one parameter that this rank owns: fp32 momentum of the local shard; second moments on the rank
    that computes the update.

    Args:
        worker: tensor-parallel rank that computes it; None where all do, as each has the whole matrix.
        tensor_rank: this rank.
    """

    def __init__(self, shard: ParameterShard, worker: int | None, tensor_rank: int):
        self.shard, self.worker = shard, worker
        self.momentum = torch.zeros_like(shard.main)
        self.second_moments = [
            torch.zeros(muon.second_moment_size(*shape), device=shard.main.device)
            for shape in shard.local.piece_shapes()
            if worker in (None, tensor_rank)
        ]
        """Of each whole matrix, one per canonical name."""

    def pieces(self, whole: Tensor) -> list[Tensor]:
        """The matrices to orthogonalise, one per second moment, of a whole parameter."""
        return self.shard.local.unfuse(whole)

    def local_lr_factor(self, tensor_rank: int) -> Tensor:
        """`muon.shape_factor` of each local row's matrix: 0-dim, or `[rows, 1]` where fused matrices differ."""
        factors = [muon.shape_factor(*shape) for shape in self.shard.local.piece_shapes()]
        if len(set(factors)) == 1:
            return torch.tensor(factors[0])
        per_group = torch.tensor(factors).repeat_interleave(torch.tensor(self.shard.local.fused_split))
        column = per_group.repeat(self.shard.local.full_shape[0] // len(per_group)).unsqueeze(1)
        return self.local_part(column, tensor_rank).to(self.momentum.device)

    def local_part(self, whole: Tensor, tensor_rank: int) -> Tensor:
        """This tensor-parallel rank's part of a whole tensor."""
        if self.shard.local.tensor_parallel_size == 1:
            return whole
        dim = self.shard.local.partition_dim
        size = self.shard.local.shape[dim]
        return whole.narrow(dim, tensor_rank * size, size)


def assign_workers(parameters: Sequence[LocalParameter], ranks: int) -> list[int | None]:
    """The tensor-parallel rank that updates each matrix, None where each of `ranks` has it whole; the same on all."""
    split = [i for i, local in enumerate(parameters) if local.tensor_parallel_size > 1]
    workers: list[int | None] = [None] * len(parameters)
    for i, worker in zip(split, balance([orthogonalisation_cost(parameters[i]) for i in split], ranks), strict=True):
        workers[i] = worker
    return workers


class ShardedMuon:
    """Muon over the matrices that this data-parallel rank owns.

    All ranks of a tensor-parallel group own the same matrices, so they call the same collectives in the same order.
    """

    def __init__(
        self,
        owned: Sequence[ParameterShard],
        tensor_group: dist.ProcessGroup | None,
        newton_schulz_steps: int,
        beta2: float,
    ):
        self.tensor_group, self.tensor_rank = tensor_group, group_rank(tensor_group)
        self.newton_schulz_steps, self.beta2 = newton_schulz_steps, beta2
        workers = assign_workers([shard.local for shard in owned], group_size(tensor_group))
        self.matrices = [MuonMatrix(*pair, self.tensor_rank) for pair in zip(owned, workers, strict=True)]
        self.lr_factors = [matrix.local_lr_factor(self.tensor_rank) for matrix in self.matrices]
        # Matrices of one shape are neighbours, so that a bucket has many to stack.
        order = sorted(range(len(owned)), key=lambda i: owned[i].local.piece_shapes())
        sizes = [self.matrices[i].momentum.numel() for i in order]
        self.buckets = [[order[n] for n in bucket] for bucket in consecutive_buckets(sizes)]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Update the main weights of all owned matrices from their gradients."""
        decay = torch.tensor(weight_decay)
        for bucket in self.buckets:
            matrices = [self.matrices[i] for i in bucket]
            directions = send_to_workers(self._directions(matrices, momentum), matrices, self.tensor_group)
            updates = send_from_workers(self._updates(matrices, directions), matrices, self.tensor_group)
            for i, matrix, update in zip(bucket, matrices, updates, strict=True):
                muon.cautious_update_(matrix.shard.main, update, lr * self.lr_factors[i], decay)

    def _directions(self, matrices: Sequence[MuonMatrix], momentum: float) -> list[Tensor]:
        """Advance the momenta; the local parts of the directions to orthogonalise, in bf16."""
        gradients = [matrix.shard.row_gradient() for matrix in matrices]
        local = muon.nesterov(gradients, [matrix.momentum for matrix in matrices], momentum)
        return [direction.bfloat16() for direction in local]

    def _updates(self, matrices: Sequence[MuonMatrix], wholes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """fp32 updates of the whole parameters whose directions are here; None for the others."""
        pieces = [[] if whole is None else m.pieces(whole) for m, whole in zip(matrices, wholes, strict=True)]
        moments = [moment for matrix in matrices for moment in matrix.second_moments]
        updates = iter(muon.updates(list(chain(*pieces)), moments, self.newton_schulz_steps, self.beta2))
        return [
            matrix.shard.local.fuse([next(updates) for _ in own]) if own else None
            for matrix, own in zip(matrices, pieces, strict=True)
        ]


def send_to_workers(
    parts: Sequence[Tensor], matrices: Sequence[MuonMatrix], group: dist.ProcessGroup | None
) -> list[Tensor | None]:
    """Whole tensors from their tensor-parallel parts, None where another rank is the worker; one all-to-all.

    Args:
        parts: this rank's part `[R, C]` of a tensor per matrix, all of one dtype.
    """
    wholes: list[Tensor | None] = [p if m.worker is None else None for p, m in zip(parts, matrices, strict=True)]
    work = _work_of_ranks(matrices, group)
    if not any(work):
        return wholes
    rank, ranks = group_rank(group), group_size(group)
    sent = torch.cat([parts[i].reshape(-1) for indices in work for i in indices])
    sizes = [sum(parts[i].numel() for i in indices) for indices in work]
    received = sent.new_empty(ranks * sizes[rank])
    dist.all_to_all_single(received, sent, [sizes[rank]] * ranks, sizes, group=group)
    from_ranks = received.view(ranks, -1).split([parts[i].numel() for i in work[rank]], dim=1)
    for i, pieces in zip(work[rank], from_ranks, strict=True):
        pieces = pieces.reshape(ranks, *parts[i].shape)
        wholes[i] = torch.cat(pieces.unbind(0), dim=matrices[i].shard.local.partition_dim)
    return wholes


def send_from_workers(
    wholes: Sequence[Tensor | None], matrices: Sequence[MuonMatrix], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The inverse of `send_to_workers`, for fp32 tensors; one all-to-all."""
    parts: list[Any] = list(wholes)
    work = _work_of_ranks(matrices, group)
    if not any(work):
        return parts
    rank, ranks = group_rank(group), group_size(group)
    mine = [(parts[i], matrices[i]) for i in work[rank]]
    momentum = matrices[0].momentum  # fp32, as the updates are
    empty = momentum.new_empty(0)
    sent = torch.cat([empty, *(m.local_part(whole, r).reshape(-1) for r in range(ranks) for whole, m in mine)])
    sizes = [sum(matrices[i].momentum.numel() for i in indices) for indices in work]
    received = momentum.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [sizes[rank]] * ranks, group=group)
    order = [i for indices in work for i in indices]
    for i, part in zip(order, received.split([matrices[i].momentum.numel() for i in order]), strict=True):
        parts[i] = part.view_as(matrices[i].momentum)
    return parts


def _work_of_ranks(matrices: Sequence[MuonMatrix], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Of each tensor-parallel rank, the matrices that it updates for all."""
    return [[i for i, m in enumerate(matrices) if m.worker == rank] for rank in range(group_size(group))]


def consecutive_buckets(sizes: Sequence[int], limit: int = GATHER_ELEMENTS) -> list[list[int]]:
    """Group consecutive indices such that the sizes of a group add up to at most `limit`, unless it has one index."""
    buckets: list[list[int]] = []
    filled = 0
    for i, size in enumerate(sizes):
        if not buckets or filled + size > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(i)
        filled += size
    return buckets
