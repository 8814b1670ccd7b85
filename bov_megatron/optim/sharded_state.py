"""Optimizer state in checkpoints: every tensor as a part of a global one, so that any layout can load it.

A state tensor has the global shape and offsets of its parameter in the model's own sharded state dict; rows that
data-parallel ranks divide among themselves are further offsets. Keys are `optimizer.<state>.<model key>`. Muon's
second moments belong to a whole matrix and are keyed by its canonical name, which no layout changes. The step count
is one number. No rank ever holds another's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bov_megatron.optim.sharding import OptimizerProcessGroups, RowAssignment, group_rank
from bov_megatron.parallel.parameter import LocalParameter

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

PREFIX = "optimizer"


class Shard(Protocol):
    """A parameter, and the rows of it that each data-parallel rank stores."""

    local: LocalParameter
    assignment: RowAssignment
    rows: tuple[int, int]
    """This rank's."""


class Stateful(Protocol):
    """An optimizer whose state can be stored."""

    groups: OptimizerProcessGroups
    step_count: int

    def state_tensors(self) -> Sequence[tuple[str, Shard, Tensor]]:
        """(state name, parameter, tensor like this rank's rows of the parameter)"""

    def second_moments(self) -> Sequence[tuple[str, Shard, str, Tensor]]:
        """(`second_moment`, parameter, canonical name of one matrix in it, `[n]` tensor)"""


def build(optimizer: Stateful, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """`{"step": int, "state": {local key: ShardedTensor}}` around the live tensors of `optimizer`.

    `model_sharded_state_dict` is what the model chunks' `sharded_state_dict` returned, any nesting; its tensors must
    be the parameters themselves. Raises ValueError where it lacks a parameter.
    """
    model_tensors = _by_parameter(model_sharded_state_dict)
    state = {}
    for name, shard, tensor in optimizer.state_tensors():
        model_tensor = model_tensors.get(id(shard.local.parameter))
        if model_tensor is None:
            raise ValueError(
                f"the model's sharded state dict has no tensor for parameter {shard.local.qualified_name}: "
                "pass the one of the same model chunks, made with keep_vars=True (Megatron's default)"
            )
        state[_local_key(name, shard.local.names[0])] = rows_of(
            shard, tensor, model_tensor, f"{PREFIX}.{name}.{model_tensor.key}"
        )
    for name, shard, canonical, tensor in optimizer.second_moments():
        state[_local_key(name, canonical)] = _second_moment(optimizer, shard, canonical, tensor)
    return {"step": optimizer.step_count, "state": state}


@torch.no_grad()
def restore(optimizer: Stateful, state_dict: dict[str, Any]) -> None:
    """Copy loaded tensors into `optimizer` and take the step count.

    Raises ValueError, before anything is changed, where a tensor is missing or has another shape.
    """
    live = {_local_key(name, shard.local.names[0]): tensor for name, shard, tensor in optimizer.state_tensors()}
    for name, _, canonical, tensor in optimizer.second_moments():
        live[_local_key(name, canonical)] = tensor
    loaded = state_dict["state"]
    for key, tensor in live.items():
        if key not in loaded:
            raise ValueError(
                f"optimizer state lacks '{key}': load into the result of this optimizer's own sharded_state_dict"
            )
        if loaded[key].shape != tensor.shape:
            raise ValueError(f"optimizer state '{key}': found {tuple(loaded[key].shape)}, need {tuple(tensor.shape)}")
    for key, tensor in live.items():
        tensor.copy_(loaded[key])
    optimizer.step_count = int(state_dict["step"])


def _local_key(name: str, canonical: str) -> str:
    """Name of a tensor inside this rank's state dict; checkpoints store the `ShardedTensor`'s key instead."""
    return f"{name}/{canonical}"


def _by_parameter(model_sharded_state_dict: dict[str, Any]) -> dict[int, Any]:
    """Sharded tensors (and factories) of the model by the identity of the parameter they hold."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    return {id(tensor.data): tensor for tensor in nested_values(tensors)}


def rows_of(shard: Shard, tensor: Tensor, model_tensor: Any, key: str) -> Any:
    """`tensor`, something of this rank's rows of a parameter, as a part of the parameter's global tensor `key`."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    # The last entry of a replica id counts data-parallel copies; state that is not replicated has one copy.
    replica_id = model_tensor.replica_id
    if not shard.assignment.replicated:
        replica_id = (*replica_id[:-1], 0)
    if shard.assignment.is_whole:
        same = {"key": key, "data": tensor, "replica_id": replica_id}
        if isinstance(model_tensor, ShardedTensor):
            same["dtype"] = tensor.dtype
        return replace(model_tensor, **same)
    if not isinstance(model_tensor, ShardedTensor):
        raise ValueError(
            f"parameter {shard.local.qualified_name} is stored through a {type(model_tensor).__name__}, whose rows "
            "cannot be split over data-parallel ranks: set parallel.use_distributed_optimizer=false"
        )
    axis = model_tensor.prepend_axis_num
    offset = list(model_tensor.global_offset)
    offset[axis] += shard.rows[0]
    return replace(
        model_tensor,
        key=key,
        data=tensor,
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # no regular grid: shares may be uneven
        replica_id=replica_id,
    )


def _second_moment(optimizer: Stateful, shard: Shard, canonical: str, tensor: Tensor) -> ShardedTensor:
    """A second moment: whole on every tensor-parallel rank, and on the data-parallel ranks that own the matrix."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    data_replica = group_rank(optimizer.groups.data) if shard.assignment.replicated else 0
    return ShardedTensor.from_rank_offsets(
        f"{PREFIX}.second_moment.{canonical}",
        tensor,
        replica_id=(0, group_rank(optimizer.groups.tensor), data_replica),
    )
