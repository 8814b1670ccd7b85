"""The lookup of distinct rows, table by table, against torch's own embedding of the whole table."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.support.distributed import run_ranks

VOCAB, HEAD_DIM, GROUPS, BATCH, LENGTH = 48, 8, 4, 2, 10
SHAPE = (BATCH, LENGTH)


def random_ids(seed: int) -> torch.Tensor:
    """Few enough values for ids to come up several times."""
    return torch.randint(VOCAB, SHAPE, generator=torch.Generator().manual_seed(seed))


IDS = {
    "text": random_ids(0),
    "one id": torch.full(SHAPE, 7),
    "the last rank's alone": torch.randint(VOCAB - 4, VOCAB, SHAPE, generator=torch.Generator().manual_seed(1)),
    "all of them": torch.cat([torch.arange(VOCAB), torch.arange(VOCAB - 40, VOCAB)]).view(2, -1),
}


def full_table(seed: int, groups: int) -> torch.Tensor:
    return torch.randn(VOCAB, groups * HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def weighting(ids: torch.Tensor, groups: int, seed: int = 5) -> torch.Tensor:
    """What the values' sum is weighted by: the gradient that each token's row gets, `[S, B, K]`."""
    shape = (*ids.t().shape, groups * HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(ids: torch.Tensor, seed: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[S, B, K]` and the table's gradient, of torch's embedding."""
    table = full_table(seed, groups).requires_grad_()
    values = F.embedding(ids.t(), table)
    (values * weighting(ids, groups)).sum().backward()
    return values.detach(), table.grad


class Rank:
    """One rank's tables, and what it should see of whole tensors."""

    def __init__(self, rank: int, world_size: int, groups: int):
        from megatron.core import parallel_state

        from bov_megatron.parallel import process_groups
        from tests.support.parity import small_model, small_recipe

        if not torch.distributed.is_initialized():
            model = small_model(num_query_groups=groups)
            recipe = small_recipe(model, tensor_model_parallel_size=world_size)
            process_groups.initialize(recipe, rank, world_size)
        self.rank, self.size, self.groups = rank, world_size, groups
        self.group = parallel_state.get_tensor_model_parallel_group()

    def table(self, seed: int = 0, main_grad: bool = True, dtype=torch.float32, on_host: bool = False):
        from bov_megatron.model.bank.table import ValueTable
        from bov_megatron.recipe import ModelConfig, ValueConfig

        value = ValueConfig(source="bank", table_memory="host" if on_host else "device")
        model = ModelConfig(num_attention_heads=self.groups, head_dim=HEAD_DIM, value=value)
        table = ValueTable(model, VOCAB, dtype, self.group)
        with torch.no_grad():
            table.weight.copy_(self.rows(full_table(seed, self.groups)))
        if main_grad:
            table.weight.main_grad = torch.zeros_like(table.weight, dtype=torch.float32)
        return table

    def rows(self, full_VK: torch.Tensor) -> torch.Tensor:
        return full_VK.chunk(self.size)[self.rank]

    def columns(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's query groups, `[…, k/D, D]`."""
        heads = full.unflatten(-1, (self.groups, HEAD_DIM))
        if self.groups >= self.size:
            return heads.chunk(self.size, dim=-2)[self.rank]
        own = self.rank * self.groups // self.size
        return heads[..., own : own + 1, :]

    def loss(self, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Ranks that share a group each count what they see of it: a part each, as attention's heads do."""
        share = max(self.size // self.groups, 1)
        return (values * self.columns(weighting(ids, self.groups))).sum() / share


def embedding_rank(rank: int, world_size: int, groups: int) -> None:
    from bov_megatron.model.bank import host_tables
    from bov_megatron.model.bank.lookup_ahead import look_up

    own = Rank(rank, world_size, groups)
    for name, ids in IDS.items():
        values, gradient = expected(ids, 0, groups)
        for main_grad, on_host in itertools.product((True, False), repeat=2):
            table = own.table(main_grad=main_grad, on_host=on_host)
            found = look_up(ids, table)
            torch.testing.assert_close(found, own.columns(values), rtol=0, atol=0, msg=name)
            own.loss(found, ids).backward()
            host_tables.wait_for_additions()
            grad = table.weight.main_grad if main_grad else table.weight.grad
            torch.testing.assert_close(grad, own.rows(gradient), rtol=1e-5, atol=1e-5)
            assert main_grad == (table.weight.grad is None)
    with torch.no_grad():
        torch.testing.assert_close(look_up(ids, own.table()), own.columns(values), rtol=0, atol=0)


@pytest.mark.parametrize("world_size, groups", [(1, 4), (2, 4), (4, 4), (4, 2), (2, 1)])
def test_values_and_gradients_of_an_embedding(world_size, groups):
    run_ranks(embedding_rank, world_size, groups)


def several_rank(rank: int, world_size: int) -> None:
    from bov_megatron.model.bank import lookup_ahead

    own = Rank(rank, world_size, GROUPS)
    micro_batches_out_of_order(own, lookup_ahead)
    shared_by_layers(own, lookup_ahead)
    bf16_sums_in_fp32(own, lookup_ahead)
    frozen_and_recomputed(own, lookup_ahead)
    ready_once_and_last(own, lookup_ahead)
    mistakes(own, lookup_ahead)


def micro_batches_out_of_order(own: Rank, lookup_ahead) -> None:
    """Two micro-batches of two tables under way at once, recomputed and differentiated last first."""
    from megatron.core.tensor_parallel import checkpoint

    tables, ids = [own.table(seed) for seed in (0, 1)], [random_ids(seed) for seed in (2, 3)]
    results = []
    for micro_batch in (0, 1):
        with lookup_ahead.started(ids[micro_batch], tables) as ticket:
            first = lookup_ahead.take(ticket, tables[0])
            second = checkpoint(lambda ticket: lookup_ahead.take(ticket, tables[1]), False, ticket)
        results.append((first, second))
    for micro_batch in (1, 0):
        sum(own.loss(values, ids[micro_batch]) for values in results[micro_batch]).backward()
    lookup_ahead.check_settled()
    for seed, table in enumerate(tables):
        wanted = sum(expected(ids[micro_batch], seed, GROUPS)[1] for micro_batch in (0, 1))
        torch.testing.assert_close(table.weight.main_grad, own.rows(wanted), rtol=1e-5, atol=1e-5)
    del results, first, second, ticket
    assert not lookup_ahead._under_way, "lookups outlive the graph that used them"


def shared_by_layers(own: Rank, lookup_ahead) -> None:
    """Three layers read one table, of which only two matter to the loss; gradients are exchanged once."""
    table, ids = own.table(), random_ids(0)
    with lookup_ahead.started(ids, [table], readers=3) as ticket:
        values = [lookup_ahead.take(ticket, None) for _ in range(3)]
    sum(own.loss(part, ids) for part in values[:2]).backward()
    wanted = 2 * expected(ids, 0, GROUPS)[1]
    torch.testing.assert_close(table.weight.main_grad, own.rows(wanted), rtol=1e-5, atol=1e-5)


def bf16_sums_in_fp32(own: Rank, lookup_ahead) -> None:
    """A thousand gradients of one row: added up in bf16, they would stop growing at 256."""
    table, ids = own.table(dtype=torch.bfloat16), torch.full((1, 1000), 7)
    lookup_ahead.look_up(ids, table).sum().backward()
    wanted = torch.zeros(VOCAB, GROUPS * HEAD_DIM)
    wanted[7] = 1000
    torch.testing.assert_close(table.weight.main_grad, own.rows(wanted), rtol=2**-8, atol=0)


def frozen_and_recomputed(own: Rank, lookup_ahead) -> None:
    """A layer with a frozen table is recomputed with the same values, and the table stays as it is."""
    from megatron.core.tensor_parallel import checkpoint

    table, ids, scale = own.table(main_grad=False), random_ids(0), torch.ones(1, requires_grad=True)
    table.weight.requires_grad_(False)
    with lookup_ahead.started(ids, [table]) as ticket:
        values = checkpoint(lambda ticket, s: s * lookup_ahead.take(ticket, table), False, ticket, scale)
    loss = own.loss(values, ids)
    loss.backward()
    torch.testing.assert_close(scale.grad, loss.detach().reshape(1))
    assert table.weight.grad is None


def ready_once_and_last(own: Rank, lookup_ahead) -> None:
    """`on_gradient_ready` is called once per backward pass and table, when the gradient is whole."""
    tables, ids, seen = [own.table(seed) for seed in range(3)], random_ids(0), []
    for number, table in enumerate(tables):
        table.weight.on_gradient_ready = lambda n=number, w=table.weight: seen.append((n, w.main_grad.clone()))
    with lookup_ahead.started(ids, tables) as ticket:
        values = [lookup_ahead.take(ticket, table) for table in tables]
    own.loss(values[0] + values[1], ids).backward()  # the third layer's values play no part
    assert sorted(number for number, _ in seen) == [0, 1, 2]
    for number, gradient in seen:
        assert torch.equal(gradient, tables[number].weight.main_grad)
    assert tables[0].weight.main_grad.any() and not tables[2].weight.main_grad.any()


def mistakes(own: Rank, lookup_ahead) -> None:
    """Each of them would otherwise give wrong values or gradients without a word."""
    table, ids = own.table(), random_ids(0)
    for wrong in (VOCAB, -1):
        with pytest.raises(IndexError, match="outside the padded vocabulary of 48"):
            lookup_ahead.look_up(torch.full(SHAPE, wrong), table)
    with lookup_ahead.started(ids, [table]) as ticket:
        with pytest.raises(RuntimeError, match="no lookups are under way for this ticket"):
            lookup_ahead.take(ticket.clone(), table)
        values = lookup_ahead.take(ticket, table)
        with pytest.raises(RuntimeError, match="took its values twice"):
            lookup_ahead.take(ticket, table)
    own.loss(values, ids).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        own.loss(values, ids).backward()
    lookup_ahead.check_settled()
    with lookup_ahead.started(ids, [table]) as ticket:  # a layer that doesn't pass the ticket's gradient on
        values = lookup_ahead.take(ticket.detach().requires_grad_(), table)
    own.loss(values, ids).backward()
    with pytest.raises(RuntimeError, match="value-table gradients of 1 micro-batches were not added to their tables"):
        lookup_ahead.check_settled()
    with pytest.raises(RuntimeError, match="were not added to their tables"):
        lookup_ahead.look_up(ids, table)


def test_micro_batches_layers_and_mistakes():
    run_ranks(several_rank, 2)
