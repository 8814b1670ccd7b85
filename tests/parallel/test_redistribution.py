"""Elements of a flattened tensor move from the ranks that hold them to the ranks that need them."""

from dataclasses import replace

import pytest
import torch

from bov_megatron.recipe import Recipe
from tests.support.distributed import run_ranks


def reordered(rank, world_size, cases):
    from bov_megatron.parallel import process_groups
    from bov_megatron.parallel.redistribution import Redistribution

    process_groups.initialize(replace(Recipe(), train=replace(Recipe().train, global_batch_size=3)), rank, world_size)
    whole = torch.arange(100)
    return [
        Redistribution(have, need, torch.distributed.group.WORLD)(whole[slice(*have[rank])]).tolist()
        == whole[slice(*need[rank])].tolist()
        for have, need in cases
    ]


def test_ranks_receive_what_they_need():
    cases = [
        ([(0, 34), (34, 68), (68, 100)], [(0, 50), (50, 100), (100, 100)]),
        ([(0, 0), (0, 100), (100, 100)], [(0, 40), (40, 80), (80, 100)]),
        ([(0, 40), (40, 80), (80, 100)], [(0, 0), (0, 7), (7, 100)]),
    ]
    assert run_ranks(reordered, 3, cases) == [[True] * 3] * 3


@pytest.mark.parametrize(("total", "parts"), [(6, [2, 2, 2]), (7, [3, 3, 1]), (2, [1, 1, 0]), (0, [0, 0, 0])])
def test_equal_parts(total, parts):
    from bov_megatron.parallel.redistribution import equal_parts

    found = equal_parts(total, 3)
    assert [stop - start for start, stop in found] == parts
    assert found[0][0] == 0 and found[-1][1] == total
