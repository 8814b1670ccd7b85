"""A second group of the same ranks, where ranks are in different numbers of groups."""

from tests.support.distributed import run_ranks

LAYOUTS = [
    {"pipeline_model_parallel_size": 4},  # first and last stage share the embedding's groups, the others have none
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
]


def twins_rank(rank, world_size, folder):
    """For each layout, sums over the twins of two groups of this rank, and what is expected."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from bov_megatron.parallel import process_groups
    from tests.support.parity import small_model, small_recipe

    found = []
    for number, layout in enumerate(LAYOUTS):
        recipe = small_recipe(small_model(num_layers=4), **layout)
        process_groups.initialize(recipe, rank, world_size, init_method=f"file://{folder}/{number}")
        tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            process_groups.twin(tensor_parallel, "gloo")  # such as a table that only this stage has
            dist.new_group([rank], use_local_synchronization=True)
        for group in (dist.group.WORLD, parallel_state.get_model_parallel_group(), tensor_parallel):
            ranks = dist.get_process_group_ranks(group)
            total = torch.tensor(float(rank))
            twin = process_groups.twin(group, "gloo")
            dist.all_reduce(total, group=twin)
            assert twin is not group and twin is process_groups.twin(group, "gloo")
            assert dist.get_process_group_ranks(twin) == ranks
            found.append((total.item(), float(sum(ranks))))
        process_groups.shutdown()
    return found


def test_ranks_in_different_numbers_of_groups_find_each_other(tmp_path):
    """Uneven layouts, one after another in one process."""
    for found in run_ranks(twins_rank, 4, tmp_path, timeout=90):
        assert len(found) == 3 * len(LAYOUTS)
        assert all(total == expected for total, expected in found), found
