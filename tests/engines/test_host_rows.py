"""Tables in host memory over data-parallel ranks move the rows that a step touches, and add in the order of ranks."""

import pytest
import torch
import torch.distributed as dist

from bov_megatron.recipe import ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.parity import LENGTH, small_model, small_recipe

VOCABULARY = 4096
IDS = [torch.arange(10, 60), torch.arange(40, 100), torch.arange(2040, 2060), torch.arange(4000, 4090)]
"""What each rank reads, in part the same."""


def recipe(precision: str = "fp32"):
    value = ValueConfig(source="bank", table_memory="host", target_layers="every")
    return small_recipe(small_model(vocab_size=VOCABULARY, value=value), precision=precision)


def batch(rank: int) -> torch.Tensor:
    ids = IDS[rank]
    return ids[torch.arange(LENGTH + 1) % len(ids)][None]


def counted_rank(rank: int, world_size: int, recipe_dict: dict) -> dict:
    """Bytes that this rank sends to others in the host tables' group: in a step, and for a checkpoint after it."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    sent: list[int] = []

    def counting(collective, share):
        def call(output, sending, *arguments, group=None, **options):
            if group is engine.host_rows.group:
                sent.append(share(sending, *arguments))
            return collective(output, sending, *arguments, group=group, **options)

        return call

    def counting_in_place(collective):
        def call(tensor, *arguments, group=None, **options):
            if group is engine.host_rows.group:
                sent.append(tensor.nbytes)
            return collective(tensor, *arguments, group=group, **options)

        return call

    def to_others(sending, _=None, sizes=None):
        kept = len(sending) // world_size if sizes is None else sizes[rank]
        return (len(sending) - kept) * sending[:1].nbytes

    dist.all_to_all_single = counting(dist.all_to_all_single, to_others)
    dist.all_gather_into_tensor = counting(dist.all_gather_into_tensor, lambda s: (world_size - 1) * s.nbytes)
    dist.all_reduce = counting_in_place(dist.all_reduce)
    micro_batches = [batch(rank), batch(rank)]
    engine.train_step(micro_batches)
    sent.clear()
    engine.train_step(micro_batches)
    step = sum(sent)
    sent.clear()
    engine.finish_gather()
    first = sum(sent)
    engine.finish_gather()
    return {"step": step, "gather": first, "again": sum(sent) - first, "tables": len(engine.host_rows.tables)}


@pytest.mark.parametrize("precision, itemsize", [("fp32", 4), ("bf16", 2)])
def test_a_step_sends_the_rows_that_it_touches(precision, itemsize):
    run = recipe(precision)
    found = run_ranks(counted_rank, 2, run.to_dict())
    row, owned = run.model.kv_dim, VOCABULARY // 2
    for rank, sent in enumerate(found):
        read, others = set(IDS[rank].tolist()), set(IDS[1 - rank].tolist())
        not_own = {i for i in read if i // owned != rank}
        asked = {i for i in others if i // owned == rank}
        expected = 8 * (1 + len(not_own)) + sent["tables"] * row * (4 * len(not_own) + itemsize * len(asked))
        assert sent["step"] == expected, "the number of ids, ids, gradients, rows"
        assert sent["gather"] >= sent["tables"] * owned * row * itemsize > 10 * sent["step"]
        assert sent["again"] == 0
        assert sent["tables"] == run.model.num_layers


def exchanged_rank(rank: int, world_size: int, recipe_dict: dict, sharded: bool) -> dict:
    from megatron.core import parallel_state

    from bov_megatron.engines.host_rows import HostRows, hidden_from_megatron
    from bov_megatron.model.bank.table import ValueTable
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    tensor = parallel_state.get_tensor_model_parallel_group()
    table = ValueTable(recipe.model, VOCABULARY, torch.float32, tensor)
    with hidden_from_megatron([table]):
        pass
    rows = HostRows([table], parallel_state.get_data_parallel_group(with_context_parallel=True), sharded)
    weight, gradient = table.weight.detach(), table.weight.main_grad
    weight.fill_(rank)
    rows.begin([batch(rank)])
    read = weight.clone()
    gradient[IDS[rank]] = torch.randn(len(IDS[rank]), gradient.size(1), generator=torch.Generator().manual_seed(rank))
    before = gradient.clone()
    rows.reduce()
    reduced = gradient.clone()
    rows.begin([batch(rank)])
    return {"read": read, "before": before, "reduced": reduced, "cleared": not gradient.any()}


@pytest.mark.parametrize("sharded", [True, False])
def test_rows_come_from_their_owners_and_gradients_add_up_in_order(sharded):
    """Three ranks, which don't divide the rows equally; every sum to the bit."""
    ranks = 3
    run = recipe()
    run.train.global_batch_size = 6
    found = run_ranks(exchanged_rank, ranks, run.to_dict(), sharded)
    owner = torch.arange(VOCABULARY) // -(-VOCABULARY // ranks)
    total = torch.zeros_like(found[0]["before"])
    for of_rank in found:
        total += of_rank["before"] / ranks
    for rank, of_rank in enumerate(found):
        fresh = torch.full((VOCABULARY,), rank)
        if sharded:
            fresh[IDS[rank]] = owner[IDS[rank]]
        assert (of_rank["read"] == fresh[:, None]).all()
        mine = (owner == rank)[:, None] if sharded else torch.tensor(True)
        assert torch.equal(of_rank["reduced"], torch.where(mine, total, 0))
        assert of_rank["cleared"]
