"""Optimizer state in checkpoints: every tensor as a part of a global one, so that any layout can load it.

A state tensor has the global shape and offsets of its parameter in the model's sharded state dict, plus the offset of
this data-parallel rank's rows. Its key is `optimizer.<state>.<model key>`. Muon's second moments belong to a whole
matrix and are keyed by its canonical name, which does not depend on the layout. The step count is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from bov_megatron.optim.sharding import OptimizerProcessGroups, RowAssignment, group_rank
from bov_megatron.parallel.parameter import LocalParameter

PREFIX = "optimizer"
MAIN = "main_param"
"""State name of fp32 main weights that are separate from the model's."""


class Shard(Protocol):
    """A parameter and the rows of it that each data-parallel rank stores."""

    local: LocalParameter
    assignment: RowAssignment
    rows: tuple[int, int]
    """This rank's."""


class Stateful(Protocol):
    """An optimizer whose state can be stored."""

    groups: OptimizerProcessGroups
    step_count: int
    moments_since: int

    def state_tensors(self) -> Sequence[tuple[str, Shard, Tensor]]:
        """(state name, parameter, tensor with the shape of this rank's rows)"""

    def second_moments(self) -> Sequence[tuple[Shard, str, Tensor]]:
        """(parameter, canonical name of a matrix in it, `[n]` tensor)"""


def build(optimizer: Stateful, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """`{"step": int, "moments_since": int, "state": {local key: ShardedTensor}}`; the tensors are those of `optimizer`,
    not copies.

    `model_sharded_state_dict` is from the model chunks' `sharded_state_dict`, with any nesting; its tensors must be the
    parameters themselves. Raises ValueError where it lacks a parameter.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    model_tensors: dict[int, Any] = {id(tensor.data): tensor for tensor in nested_values(sharded)}
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
    for shard, canonical, tensor in optimizer.second_moments():
        state[_local_key("second_moment", canonical)] = _second_moment(optimizer, shard, canonical, tensor)
    return {"step": optimizer.step_count, "moments_since": optimizer.moments_since, "state": state}


def main_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The separate fp32 main weights in the result of `build`, to load from the model's own tensors."""
    prefix = f"{PREFIX}.{MAIN}."
    return {
        name: replace(tensor, key=tensor.key.removeprefix(prefix))
        for name, tensor in state["state"].items()
        if tensor.key.startswith(prefix)
    }


@torch.no_grad()
def restore(optimizer: Stateful, state_dict: dict[str, Any]) -> None:
    """Copy loaded tensors and step count into `optimizer`.

    Raises ValueError, before changing anything, where a tensor is missing or has another shape.
    """
    live = {_local_key(name, shard.local.names[0]): tensor for name, shard, tensor in optimizer.state_tensors()}
    live |= {_local_key("second_moment", canonical): tensor for _, canonical, tensor in optimizer.second_moments()}
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
    optimizer.moments_since = int(state_dict.get("moments_since", 0))  # earlier versions store none


def _local_key(name: str, canonical: str) -> str:
    """Key of a tensor in this rank's state dict; checkpoints use the `ShardedTensor`'s key instead."""
    return f"{name}/{canonical}"


def rows_of(shard: Shard, tensor: Tensor, model_tensor: Any, key: str) -> Any:
    """`tensor`, weights or state of this rank's rows of a parameter, as part of the global tensor `key`.

    `model_tensor` is the parameter's ShardedTensor or factory in the model's sharded state dict.
    """
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
        axis_fragmentations=None,  # shares may be uneven, so they are not on a regular grid
        replica_id=replica_id,
    )


def _second_moment(optimizer: Stateful, shard: Shard, canonical: str, tensor: Tensor) -> ShardedTensor:
    """A second moment: one rank has it, or all ranks that have the whole matrix."""
    data_replica = group_rank(optimizer.groups.data) if shard.assignment.replicated else 0
    tensor_replica = group_rank(optimizer.groups.tensor) if shard.local.tensor_parallel_size == 1 else 0
    return ShardedTensor.from_rank_offsets(
        f"{PREFIX}.second_moment.{canonical}",
        tensor,
        replica_id=(0, tensor_replica, data_replica),
    )
