"""Each silent mistake that tensor, sequence and pipeline parallelism invite, made on purpose: parity must fail.

A trap is a function that makes the mistake in a rank's own modules. What it breaks is measured against one process
with untouched code, beside the same layout untouched; so these tests show that the parity tests can fail.

Mistakes that cannot be made here, and why:
- sources that read the first stage on a later one: refused (tests/test_recipe.py);
- rates lost in Megatron's parameter-group overrides, optimizer state under its `dp_reshardable` format: the
  optimizer is not Megatron's;
- a 0-dim gamma: the optimizer refuses one (tests/optim);
- a metadata dict that Megatron has changed, passed on: each call makes its own;
- layers of a checkpoint under one stacked name (no `non_homogeneous_layers`): tried with a bank in half of the layers,
  saved over two stages and loaded on one rank, it comes back right in Megatron-core 0.16.1.
"""

import dataclasses
import functools

import pytest
import torch

from bov_megatron.recipe import OptimizerConfig, Recipe, ValueConfig, recipe_from_dict
from tests.model.test_golden import golden_rank
from tests.support.distributed import run_ranks
from tests.support.golden_files import load_golden
from tests.support.layouts import LAYOUTS
from tests.support.parity import (
    batch,
    gather_full,
    gather_gradients,
    load_weights,
    my_micro_batches,
    random_weights,
    relative_error,
    small_model,
    small_recipe,
    worst_gradient,
)

STEPS = 3


def untouched():
    pass


def ids_kept_on_the_module():
    """Recomputed, micro-batch i sees the ids of the micro-batch that ran last."""
    from bov_megatron.model.decoder import BovModel
    from bov_megatron.model.sources import Bank

    forward = BovModel.forward

    def storing(self, ids_BS, *others):
        for module in self.modules():
            if isinstance(module, Bank):
                module.ids = ids_BS
        return forward(self, ids_BS, *others)

    BovModel.forward = storing
    Bank.forward = lambda self, projected, hidden, carried, project: self.scaled(self.table(self.ids))


def ids_on_the_first_stage_only():
    from bov_megatron.model.decoder import BovModel

    BovModel._carried = lambda self, ids_BS, hidden: ids_BS if self.pre_process else torch.zeros_like(ids_BS)


def all_reduce_and_plain_slice():
    """Right forward; backward, each rank learns its own columns only."""
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    from bov_megatron.model.bank.table import ValueTable

    def combine(self, partial):
        summed = reduce_from_tensor_model_parallel_region(partial.contiguous(), group=self.tp_group)
        return summed.chunk(self.tp_group.size(), dim=-1)[self.tp_group.rank()].contiguous()

    ValueTable._combine = combine


def all_reduce_of_a_view():
    """Megatron's `_reduce` returns a non-contiguous input as it came."""
    from megatron.core.tensor_parallel.mappings import (
        reduce_from_tensor_model_parallel_region,
        scatter_to_tensor_model_parallel_region,
    )

    from bov_megatron.model.bank.table import ValueTable

    def combine(self, partial):
        view = partial.transpose(0, 2).contiguous().transpose(0, 2)
        summed = reduce_from_tensor_model_parallel_region(view, group=self.tp_group)
        return scatter_to_tensor_model_parallel_region(summed, group=self.tp_group)

    ValueTable._combine = combine


def rows_of_the_latest_micro_batch():
    """Recomputed, micro-batch i takes the rows of the one that ran last."""
    from bov_megatron.model.bank import lookup_ahead

    class Latest(dict):
        def get(self, ticket):
            return list(self.values())[-1]

    lookup_ahead._under_way = Latest()


def each_distinct_id_counted_once():
    """A row's gradient is then that of the last token with its id, not the sum over its tokens."""
    from bov_megatron.model.bank.lookup_ahead import _Lookup

    def add(self, grad):
        self.readers_to_come -= 1
        self.gradient_Uk = grad.new_empty(sum(self.ids.counts_T), self.ids.width)
        self.gradient_Uk[self.ids.inverse_SB.flatten()] = grad.flatten(0, 1)

    _Lookup.add_gradient = add


def tickets_cut_off():
    """The backward pass doesn't reach the decoder's start, and gradients on their way stay there."""
    from bov_megatron.model import sources

    take = sources.lookup_ahead.take
    sources.lookup_ahead.take = lambda ticket, table: take(ticket.detach().requires_grad_(), table)


def tickets_cut_off_unseen():
    """The same without the engine's check: the table whose backward comes last, the first of the stage, misses it."""
    from bov_megatron.model.bank import lookup_ahead

    tickets_cut_off()
    lookup_ahead.check_settled = lambda: None


def gradients_not_waited_for():
    """What arrives behind the backward pass is added before it is there."""
    from bov_megatron.model.bank.lookup_ahead import _Lookup

    send = _Lookup.send_gradient

    def sending(self):
        send(self)
        self.late, self.work = (self.work, self.received), None
        self.received = torch.zeros_like(self.received)

    _Lookup.send_gradient = sending


def host_gradients_not_reduced():
    """Tables in host memory are in none of Megatron's buffers: nobody else adds up their gradients."""
    from bov_megatron.engines.host_rows import HostRows
    from bov_megatron.model.bank import host_tables

    HostRows.reduce = lambda self: host_tables.wait_for_additions()


def host_gradients_not_cleared():
    from bov_megatron.engines.host_rows import HostRows

    HostRows._clear = lambda self: None


def host_rows_not_asked_for():
    """A data-parallel rank reads rows of host tables as they were before the others updated them."""
    from bov_megatron.engines.host_rows import HostRows

    HostRows._get_rows = lambda self: None


def host_weights_not_gathered():
    """A data-parallel rank keeps to the rows that it updates itself."""
    from bov_megatron.optim.optimizer import BovOptimizer
    from bov_megatron.optim.weight_gatherer import WeightGatherer

    make = BovOptimizer._gatherer
    BovOptimizer._gatherer = lambda self, on_host: WeightGatherer([], [], None) if on_host else make(self, on_host)


def gamma_without_copy_to():
    """Each tensor-parallel rank trains a gamma of its own heads."""
    from bov_megatron.model.sources import ValueSource

    ValueSource.on_own_heads = lambda self, scalar: scalar


def gate_without_copy_to():
    from bov_megatron.model import sources

    sources.copy_to_tensor_model_parallel_region = lambda channels, group: channels


def smear_after_the_split():
    """The first token of a rank's chunk of the sequence has no neighbour."""
    from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

    from bov_megatron.model.decoder import BovModel
    from bov_megatron.model.norm import rms_norm

    def embed(self, ids_BS, first):
        x = rms_norm(self.embedding(input_ids=ids_BS, position_ids=None))
        return self.smear(scatter_to_sequence_parallel_region(x, group=self.pg_collection.tp))

    BovModel._embed = embed


def smear_after_the_zigzag():
    """The first token of each of a context-parallel rank's two stretches has no neighbour."""
    from bov_megatron.model import context_parallel
    from bov_megatron.model.decoder import BovModel
    from bov_megatron.model.norm import rms_norm

    def embed(self, ids_BS, first):
        ids = context_parallel.take(ids_BS, 1, self.pg_collection.cp)
        return self.smear(rms_norm(self.embedding(input_ids=ids, position_ids=None)))

    BovModel._embed = embed


def angles_from_zero_on_each_rank():
    from bov_megatron.model import context_parallel

    positions = context_parallel.positions
    context_parallel.positions = lambda *arguments: positions(*arguments).argsort()


def keys_gathered_in_rank_order():
    """Queries of one rank then see keys that come after them."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from bov_megatron.model import core_attention

    core_attention.gather_sequence = lambda part, group: gather_from_sequence_parallel_region(part, group=group)


def local_mean_as_the_loss():
    """The schedule multiplies by the context-parallel ranks what the gradients' mean doesn't divide by them again."""
    from bov_megatron.engines.megatron import MegatronEngine

    run = MegatronEngine._run

    def undivided(self, model, micro_batches, loss_function, counted=None):
        def mean(labels, counted_B, losses):
            return losses.mean(), loss_function(labels, counted_B, losses)[1]

        return run(self, model, micro_batches, mean, counted)

    MegatronEngine._run = undivided


def batched_messages_when_interleaved():
    """Megatron's defaults; two stages, each of them the other's next and previous one, mix them up."""
    from bov_megatron.model import decoder

    configure = decoder.transformer_config

    def batched(recipe):
        config = configure(recipe)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    decoder.transformer_config = batched


def padding_in_the_loss():
    """Rows of the vocabulary that are no tokens take part in the softmax; how many depends on the layout."""
    from bov_megatron.model.output import OutputLayer

    make = OutputLayer.__init__

    def without_padding(self, config, vocab_size, padded_vocab_size, *rest):
        make(self, config, padded_vocab_size, padded_vocab_size, *rest)

    OutputLayer.__init__ = without_padding


def loss_logged_without_a_copy():
    """The schedule divides the loss by the number of micro-batches in place."""
    from bov_megatron.engines.megatron import MegatronEngine

    run = MegatronEngine._run

    def aliasing(self, model, micro_batches, loss_function, counted=None):
        def aliased(labels, counted_B, losses):
            loss, _ = loss_function(labels, counted_B, losses)
            return loss, loss.detach()

        return run(self, model, micro_batches, aliased, counted)

    MegatronEngine._run = aliasing


def describe_to_the_optimizer(change):
    """Give the optimizer `change(local)` of each parameter."""
    from bov_megatron.optim.optimizer import BovOptimizer

    make = BovOptimizer.__init__

    def misled(self, parameters, *rest):
        make(self, [change(local) for local in parameters], *rest)

    BovOptimizer.__init__ = misled


def table_taken_for_a_matrix():
    def as_matrix(local):
        if local.kind != "table":
            return local
        return dataclasses.replace(local, specs=(dataclasses.replace(local.specs[0], kind="matrix"),))

    describe_to_the_optimizer(as_matrix)


def query_and_key_orthogonalised_as_one():
    from bov_megatron.optim.muon_sharded import MuonMatrix
    from bov_megatron.parallel.parameter import LocalParameter

    fuse = LocalParameter.fuse
    LocalParameter.piece_shapes = lambda self: [self.full_shape]
    LocalParameter.fuse = lambda self, pieces: pieces[0] if len(pieces) == 1 else fuse(self, pieces)
    MuonMatrix.pieces = lambda self, whole: [whole]


def muon_on_a_shard():
    describe_to_the_optimizer(lambda local: dataclasses.replace(local, tensor_parallel_size=1))


def one_step_tensor_for_all():
    """Every parameter advances it: AdamW's bias correction runs ahead."""
    from bov_megatron.optim import optimizer

    allocate = optimizer.allocate_state

    def sharing(adamw, weights):
        allocate(adamw, weights)
        states = list(adamw.state.values())
        for state in states:
            state["step"] = states[0]["step"]

    optimizer.allocate_state = sharing


LEFT_BEHIND = "value-table gradients of . micro-batches were not added to their tables"
IN_HOST_MEMORY = {"table_memory": "host"}
TABLES_EVERYWHERE = {"target_layers": "every"}
TRAPS = [
    # mistake, layout, value source, its options, what it breaks, by how much at least
    (ids_kept_on_the_module, "pp2-full", "bank", TABLES_EVERYWHERE, "gradients", 0.3),
    (ids_on_the_first_stage_only, "pp2", "bank", {}, "gradients", 0.3),
    (all_reduce_and_plain_slice, "tp2", "bank", {"lookup": "reduce_scatter"}, "gradients", 0.3),
    (all_reduce_of_a_view, "tp2", "bank", {"lookup": "reduce_scatter"}, "gradients", 0.3),
    (rows_of_the_latest_micro_batch, "pp2-tp2-sp-full", "bank", TABLES_EVERYWHERE, LEFT_BEHIND, None),
    (each_distinct_id_counted_once, "tp2", "bank", {}, "gradients", 0.3),
    (tickets_cut_off, "tp2", "bank", TABLES_EVERYWHERE, LEFT_BEHIND, None),
    (tickets_cut_off_unseen, "tp2", "bank", TABLES_EVERYWHERE, "gradients", 0.3),
    (gradients_not_waited_for, "tp2", "bank", {}, "gradients", 0.9),
    (host_gradients_not_reduced, "dp2", "bank", IN_HOST_MEMORY, "gradients", 0.3),
    (host_gradients_not_cleared, "dp2", "bank", IN_HOST_MEMORY, "updates", 0.3),
    (gamma_without_copy_to, "tp2", "bank", {}, "source_coefficient.* differs between ranks", None),
    (gate_without_copy_to, "tp2", "gated_value_embedding", {}, "smear.gate.* differs between ranks", None),
    (smear_after_the_split, "tp2-sp", "bank", {}, "smear.gate.* differs between ranks", None),
    (smear_after_the_zigzag, "cp2", "bank", {}, "gradients", 1e-3),
    (angles_from_zero_on_each_rank, "cp2", "bank", {}, "gradients", 0.1),
    (keys_gathered_in_rank_order, "cp2", "bank", {}, "gradients", 0.1),
    (local_mean_as_the_loss, "cp2", "bank", {}, "gradients", 0.9),
    (batched_messages_when_interleaved, "vpp2", "bank", {}, "gradients", 0.3),
    (padding_in_the_loss, "tp2", "bank", {}, "losses", 0.01),
    (loss_logged_without_a_copy, "dp2", "bank", {}, "losses", 0.4),
    (table_taken_for_a_matrix, "tp2", "bank", {}, "updates", 0.3),
    (query_and_key_orthogonalised_as_one, "tp2", "bank", {}, "updates", 0.3),
    (muon_on_a_shard, "tp2", "bank", {}, "updates", 0.3),
    (one_step_tensor_for_all, "dp2", "bank", {}, "updates", 0.3),
]
TOLERANCES = {"losses": 1e-3, "gradients": 1e-5, "updates": 0.1}
"""What layouts may differ by: rounding, and for updates and the losses after them Muon's bf16 orthogonalisation."""


def recipe_of(source: str, value: dict, **layout) -> Recipe:
    """Rates high enough for each step to show in the next loss."""
    recipe = small_recipe(small_model(value=ValueConfig(source=source, **value)), **layout)
    recipe.optimizer = OptimizerConfig(warmup_steps=0, reference_batch_tokens=None, reference_parameters=None)
    return recipe


def measure(recipe: Recipe, world_size: int, trap: str = "untouched") -> dict:
    """Losses of a few steps, gradients of the first, and what the first updates changed, whole, by canonical name."""
    results = run_ranks(measured_rank, world_size, recipe.to_dict(), trap)
    whole = {"losses": results[0]["losses"], "gradients": {}, "updates": {}}
    for result in results:
        whole["gradients"].update(result["gradients"])
        whole["updates"].update(result["updates"])
    return whole


def measured_rank(rank: int, world_size: int, recipe_dict: dict, trap: str) -> dict:
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    globals()[trap]()
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    weights = random_weights(recipe.model)
    load_weights(engine, weights)
    losses = [float(engine.forward_backward(my_micro_batches(recipe, batch(0))))]
    gradients = gather_gradients(engine)
    assert engine.optimizer.step().applied
    losses += [engine.train_step(my_micro_batches(recipe, batch(step))).loss for step in range(1, STEPS)]
    after = gather_full(engine, lambda parameter: parameter)
    return {"losses": losses, "gradients": gradients, "updates": {name: after[name] - weights[name] for name in after}}


@functools.lru_cache(maxsize=16)
def one_process(source: str, **value) -> dict:
    return measure(recipe_of(source, {k: v for k, v in value.items() if k not in ("lookup", "table_memory")}), 1)


@functools.lru_cache(maxsize=16)
def layout_untouched(layout: str, source: str, **value) -> dict:
    world_size, parallel = LAYOUTS[layout]
    return measure(recipe_of(source, value, **parallel), world_size)


def errors(found: dict, wanted: dict) -> dict[str, float]:
    """Largest relative difference of losses, gradients and updates."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], wanted["losses"], strict=True))
    worst = {what: worst_gradient(found[what], wanted[what])[0] for what in ("gradients", "updates")}
    return {"losses": losses, **worst}


@pytest.mark.parametrize("trap, layout, source, value, what, least", TRAPS, ids=[trap[0].__name__ for trap in TRAPS])
def test_a_sprung_trap_breaks_parity(trap, layout, source, value, what, least):
    wanted = one_process(source, **value)
    clean = errors(layout_untouched(layout, source, **value), wanted)
    assert all(clean[kind] < tolerance for kind, tolerance in TOLERANCES.items()), clean
    world_size, parallel = LAYOUTS[layout]
    recipe = recipe_of(source, value, **parallel)
    if least is None:
        with pytest.raises(AssertionError, match=what):
            measure(recipe, world_size, trap.__name__)
        return
    sprung = errors(measure(recipe, world_size, trap.__name__), wanted)
    assert sprung[what] > least, sprung
    assert sprung[what] > 5 * clean[what], (sprung, clean)


@pytest.mark.parametrize("trap", [untouched, host_weights_not_gathered, host_rows_not_asked_for])
def test_data_parallel_ranks_bring_each_other_rows_of_host_tables(trap):
    """Of tables large enough for ranks to divide them."""
    found = []
    for world_size, memory, mistake in ((1, "device", untouched), (2, "host", trap)):
        recipe = recipe_of("bank", {"table_memory": memory})
        recipe.model.head_dim = 64
        found.append(measure(recipe, world_size, mistake.__name__))
    expected, updates = found[0]["updates"], found[1]["updates"]
    error = max(relative_error(updates[name], expected[name]) for name in expected if "table" in name)
    off = max(abs(a / b - 1) for a, b in zip(found[1]["losses"], found[0]["losses"], strict=True))
    assert (error > TOLERANCES["updates"]) == (trap is not untouched), error
    assert (off > TOLERANCES["losses"]) == (trap is host_rows_not_asked_for), off


def golden_rank_with_one_key_less(rank: int, world_size: int, name: str):
    from bov_megatron.model.core_attention import SdpaCoreAttention

    make = SdpaCoreAttention.__init__

    def narrower(self, *args, window, **options):
        make(self, *args, window=window - 1, **options)

    SdpaCoreAttention.__init__ = narrower
    return golden_rank(rank, world_size, name, False)


def test_a_window_of_one_key_less_misses_the_reference():
    """The window counts keys to the left; the query itself comes on top."""
    golden = load_golden("bov")
    ((_, gradients, logits),) = run_ranks(golden_rank_with_one_key_less, 1, "bov")
    assert relative_error(logits, golden.logits) > 1e-4
    assert worst_gradient(gradients, golden.gradients)[0] > 1e-3


def initial_rank(rank: int, world_size: int, recipe_dict: dict, by_rank: bool) -> dict[str, torch.Tensor]:
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.model import initialization
    from bov_megatron.parallel import process_groups

    if by_rank:  # what drawing from a rank's generator comes to
        seed = initialization._block_seed
        initialization._block_seed = lambda run_seed, name, block: seed(run_seed + rank, name, block)
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    return gather_full(MegatronEngine(recipe, with_optimizer=False), lambda parameter: parameter)


def initial_weights(source: str, layout: str | None, by_rank: bool = False) -> dict[str, torch.Tensor]:
    world_size, parallel = LAYOUTS[layout] if layout else (1, {})
    recipe = small_recipe(small_model(value=ValueConfig(source=source)), **parallel)
    whole = {}
    for part in run_ranks(initial_rank, world_size, recipe.to_dict(), by_rank):
        whole.update(part)
    return whole


@pytest.mark.parametrize("source", ["bank", "gated_value_embedding"])
def test_initial_weights_are_the_same_bits_in_every_layout(source):
    wanted = initial_weights(source, None)
    for layout in ("tp4", "pp2-tp2"):
        found = initial_weights(source, layout)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_initial_weights_drawn_by_rank_differ():
    with pytest.raises(AssertionError, match="smear.gate.* differs between ranks"):
        initial_weights("bank", "tp2", by_rank=True)
    found, wanted = initial_weights("bank", "pp2", by_rank=True), initial_weights("bank", None)
    assert not torch.equal(found["lm_head.weight"], wanted["lm_head.weight"])
    assert not torch.equal(*(w["model.layers.3.self_attn.value_table.weight"] for w in (found, wanted)))
