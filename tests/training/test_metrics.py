"""What a run writes down, against counts and scores made another way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bov_megatron.data.loader import TrainLoader
from bov_megatron.recipe import load_recipe
from tests.support.distributed import run_ranks
from tests.support.parity import gather_full
from tests.support.runs import SMOKE, metrics, overrides, train

UNEVEN = ["validation.tokens=1792", "validation.micro_batch_size=2"]
"""Seven samples: four on one rank and three on the other, in micro-batches of two."""


@pytest.fixture(scope="module")
def run(prepared_data, tmp_path_factory):
    """`(arguments, recipe, lines)` of a run at TP 2 · DP 2."""
    folder = tmp_path_factory.mktemp("run")
    arguments = overrides(prepared_data, folder, *UNEVEN, "parallel.tensor_model_parallel_size=2")
    train(4, arguments)
    return arguments, load_recipe(SMOKE, arguments), metrics(folder)


def test_every_step_has_its_line(run):
    _, recipe, lines = run
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert line["updated"] and math.isfinite(line["loss"]) and line["gradient_norm"] > 0
        assert line["tokens"] == line["step"] * 4 * 256
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    with_tables = [line["step"] for line in lines if "gamma/layer_2" in line]
    assert with_tables == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [4, 8]


def test_digests_and_touched_rows_equal_a_direct_count(run):
    _, recipe, lines = run
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "sequence_length": 256, "vocab_size": 512}
    with TrainLoader(recipe.data, **sizes) as loader:
        for line, drawn in zip(lines, loader, strict=False):
            assert line["digest"] == drawn.digest
            if "table_rows_touched/layer_2" in line:
                touched = drawn.micro_batches[0][:, :-1].unique().numel()
                assert line["table_rows_touched/layer_2"] == touched / 512


def final_weights(rank, world_size, arguments):
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import run_folder
    from bov_megatron.parallel import process_groups

    recipe = load_recipe(SMOKE, arguments)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe, with_optimizer=False)
    checkpoint.load(engine, run_folder.latest_checkpoint(recipe.run_dir))
    return gather_full(engine, lambda parameter: parameter)


@pytest.fixture(scope="module")
def weights(run):
    alone = [item for item in run[0] if not item.startswith("parallel.")]
    return run_ranks(final_weights, 1, [*alone, "parallel.tensor_model_parallel_size=1"])[0]


def test_gamma_and_row_norms_are_the_weights_own(run, weights):
    last = run[2][-1]
    gamma = weights["model.layers.2.self_attn.source_coefficient"].item()
    table = weights["model.layers.2.self_attn.value_table.weight"].double()
    assert last["gamma/layer_2"] == gamma != 1
    assert last["table_row_norm/layer_2"] == pytest.approx(table.norm(dim=1).square().mean().sqrt().item(), rel=1e-9)


def test_validation_equals_the_exported_model_class(run, weights, prepared_data):
    """Seven samples over two data-parallel ranks, scored again with transformers' model, plainly."""
    from bov_megatron.data.tokenizer import load_bytes_per_token
    from bov_megatron.evaluation.bits_per_byte import read_packed_samples
    from bov_megatron.exchange.export import hf_config
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    _, recipe, lines = run
    model = BovForCausalLM(hf_config(recipe.model)).eval()
    model.load_state_dict(weights)
    size_of = torch.from_numpy(load_bytes_per_token(prepared_data.tokenizer))
    stored = read_packed_samples(prepared_data.folder / "val", 7)
    samples = torch.from_numpy(np.stack(list(stored)).astype(np.int64))
    with torch.no_grad():
        logits = model(samples[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten(), reduction="none")
    sizes = size_of[samples[:, 1:].flatten()]
    assert (sizes == 0).any(), "no special token among the targets: the test would not see it counted"
    wanted = nats.double()[sizes > 0].sum() / math.log(2) / sizes.sum()
    assert lines[-1]["validation_bits_per_byte"] == pytest.approx(wanted.item(), rel=1e-5)
    per_token = nats.double()[sizes > 0].mean()
    assert lines[-1]["validation_loss"] == pytest.approx(per_token.item(), rel=1e-5)


TP2_BF16 = ["train.precision=bf16", "parallel.tensor_model_parallel_size=2"]


def loss_rank(rank, world_size, arguments):
    """Two steps in bf16: losses, dtype of weights, main weights and gradients."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups
    from tests.support.parity import my_micro_batches

    recipe = load_recipe(SMOKE, arguments)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    ids = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(0))
    losses = [engine.train_step(my_micro_batches(recipe, ids)).loss for _ in range(4)]
    types = {parameter.dtype for parameter in engine.model.parameters()}
    mains = {managed.main.dtype for managed in engine.optimizer.parameters}
    separate = all(managed.has_separate_main for managed in engine.optimizer.parameters)
    gradients = {parameter.main_grad.dtype for parameter in engine.model.parameters()}
    return losses, types, mains, separate, gradients


def test_bf16_over_two_ranks_is_close_to_one(prepared_data, tmp_path):
    one_rank = overrides(prepared_data, tmp_path, "train.precision=bf16")
    ((one, types, mains, separate, gradients),) = run_ranks(loss_rank, 1, one_rank)
    assert (types, mains, separate, gradients) == ({torch.bfloat16}, {torch.float32}, True, {torch.float32})
    ((fp32, *_),) = run_ranks(loss_rank, 1, overrides(prepared_data, tmp_path, "train.precision=fp32"))
    both = run_ranks(loss_rank, 2, overrides(prepared_data, tmp_path, *TP2_BF16))
    print("BF16", one, both[0][0], fp32)
    assert both[0][0] == both[1][0] == pytest.approx(one, rel=1e-3)
    assert one == pytest.approx(fp32, rel=5e-3)
    assert one[-1] < one[0] - 0.1
