"""Starting and ending the process groups of a run."""

from __future__ import annotations

import datetime
import os
import re

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import distributed_c10d

from bov_megatron.errors import LaunchError
from bov_megatron.parallel import megatron_on_cpu, regions
from bov_megatron.parallel.device import FEWER_RANKS, backend, device, has_gpu, select_gpu
from bov_megatron.recipe import Recipe, data_parallel_size

TIMEOUT = datetime.timedelta(minutes=30)


def initialize(
    recipe: Recipe,
    rank: int,
    world_size: int,
    local_rank: int = 0,
    init_method: str = "env://",
) -> None:
    """Join `world_size` ranks, build Megatron's groups for the recipe's layout and seed torch's generators.

    Raises RecipeError if the layout doesn't divide the world, LaunchError where ranks would share a GPU.
    """
    data_parallel_size(recipe, world_size)  # raises
    megatron_on_cpu.enable()
    regions.enable(recipe.train.compile)
    if recipe.parallel.tensor_model_parallel_size > 1:
        # Megatron overlaps the gradient's all-reduce with a matmul and relies on the order of launches.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # A rank's collectives of different groups overlap, in the order in which it launches them (NCCL 2.26 and later).
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, with the first product
    select_gpu(local_rank)
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                backend(),
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=TIMEOUT,
                device_id=device() if has_gpu() else None,
            )
        except dist.DistBackendError as error:  # each of two ranks saw one GPU, the same
            if duplicate := re.search("Duplicate GPU detected.*", str(error)):
                raise LaunchError(f"{duplicate[0]}: {FEWER_RANKS}") from None
            raise
    layout = recipe.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_stages,
        context_parallel_size=layout.context_parallel_size,
        create_gloo_process_groups=False,
    )
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    # The model doesn't draw from these generators (see model/initialization.py), but Megatron requires a seed.
    torch.manual_seed(recipe.train.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.train.seed)


# Global because torch's and Megatron's groups are: one twin serves all modules of this process, from `initialize` to
# `shutdown`, and making another is collective.
_twins: dict[tuple[dist.ProcessGroup, str | None], dist.ProcessGroup] = {}


def twin(group: dist.ProcessGroup, backend: str | None = None) -> dist.ProcessGroup:
    """A second group of the same ranks, shared by all callers; all ranks of `group` call this.

    For another backend, or for asynchronous collectives that would delay later ones on `group`.
    """
    key = (group, backend)
    if key not in _twins:
        _twins[key] = _make_twin(group, backend or dist.get_backend(group))
    return _twins[key]


def _make_twin(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    # As dist.new_group(use_local_synchronization=True), but named after `group`. torch's own name contains the number
    # of groups that this process is in; where that differs between ranks, each waits for the others under another name.
    ranks = dist.get_process_group_ranks(group)
    _, store = distributed_c10d._world.pg_map[distributed_c10d._get_default_group()]
    name = distributed_c10d.GroupName(f"{group.group_name}/{backend}")
    if dist.get_backend(group) == "fake":  # the other ranks of a simulation don't exist
        backend = "fake"
    made, _ = distributed_c10d._new_process_group_helper(
        len(ranks), group.rank(), ranks, dist.Backend(backend), store, name, timeout=TIMEOUT
    )
    distributed_c10d._world.pg_group_ranks[made] = {rank: number for number, rank in enumerate(ranks)}
    return made


def shutdown() -> None:
    """Leave all groups; a later `initialize` may build another layout."""
    _twins.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
