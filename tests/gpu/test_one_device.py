"""What one process shows of the device it runs on: a GPU under `make gpu`, the CPU under `make test`."""

import hashlib
import os

import pytest
import torch

from bov_megatron.model.core_attention import attend
from bov_megatron.parallel.device import device, has_gpu
from bov_megatron.recipe import ValueConfig, recipe_from_dict
from tests.model.test_core_attention import plain_attention, random_inputs
from tests.model.test_golden import golden_rank
from tests.optim.test_trajectory import rank_trains
from tests.support.distributed import run_ranks
from tests.support.golden_files import GOLDEN_NAMES, TRAJECTORY_NAMES, load_golden
from tests.support.parity import batch, load_weights, my_micro_batches, random_weights, small_model, small_recipe


def all_golden_rank(rank, world_size):
    """By golden file, the distances of Megatron's model and of the plain one."""
    from bov_megatron.parallel import process_groups

    found = {}
    for name in GOLDEN_NAMES:
        golden = load_golden(name)
        ours = golden_rank(rank, world_size, name, False, "bf16")
        process_groups.shutdown()
        found[name] = distances(golden, *ours), distances(golden, *plain(golden))
    return found


def plain(golden):
    """Loss, gradients and logits at the golden positions of the plain-PyTorch model, all of it in bf16."""
    from bov_megatron.exchange.export import hf_config
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    model = BovForCausalLM(hf_config(golden.model))
    model.load_state_dict(golden.weights, strict=True)
    model.to(device(), torch.bfloat16)
    logits = model(golden.tokens.to(device())).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), golden.targets.to(device()).flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), gradients, logits[:, golden.positions].detach()


def distances(golden, loss, gradients, logits) -> dict[str, float]:
    """From the reference's fp32: of the logits, and of all gradients together, relative; of the loss in nats."""
    off = sum((gradients[n].float().cpu() - g).square().sum() for n, g in golden.gradients.items())
    norm = sum(g.square().sum() for g in golden.gradients.values())
    return {
        "logits": ((logits.float().cpu() - golden.logits).norm() / golden.logits.norm()).item(),
        "gradients": (off / norm).sqrt().item(),
        "loss": abs(loss - golden.loss.item()),
    }


def test_bf16_is_as_near_to_the_reference_as_plain_pytorch():
    for name, (ours, plain) in run_ranks(all_golden_rank, 1)[0].items():
        assert ours["logits"] < 1.2 * plain["logits"], name
        assert ours["gradients"] < 1.2 * plain["gradients"], name
        assert ours["loss"] < plain["loss"] + 5e-4, name


@pytest.mark.parametrize("name", TRAJECTORY_NAMES)
def test_ten_steps_of_the_reference_in_bf16(name):
    losses = run_ranks(rank_trains, 1, name, {"precision": "bf16"})[0]
    assert losses == pytest.approx(load_golden(name).trajectory.losses.tolist(), abs=5e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 2e-3)])
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("window, first_query", [(384, 0), (100, 0), (384, 256), (100, 256)])
def test_queries_see_their_windows(window, first_query, groups, dtype, tolerance):
    """A whole sequence, and a context-parallel rank's stretch of it, against plain attention in fp64."""
    query, key, value, grad = (x.detach().to(device(), dtype).requires_grad_() for x in random_inputs(384, groups))
    stretch = slice(first_query, first_query + 128 if first_query else None)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    results = []
    for inputs, mixed in (
        ((query, key, value), attend(query[:, :, stretch], key, value, window, first_query)),
        (exact, plain_attention(*exact, window)[:, :, stretch]),
    ):
        results.append((mixed, *torch.autograd.grad(mixed, inputs, grad[:, :, stretch].to(mixed))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() / expected.norm() < tolerance


def train_rank(rank, world_size, recipe_dict):
    """Losses of three steps and a digest of the weights after them."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    load_weights(engine, random_weights(recipe.model))
    losses = [engine.train_step(my_micro_batches(recipe, batch(step))).loss for step in range(3)]
    digest = hashlib.sha256()
    for local in engine.local_parameters():
        digest.update(local.parameter.detach().float().cpu().numpy().tobytes())
    return losses, digest.hexdigest()


# Ids repeat within a batch of uniform ones from 96, so rows of the table and of the embedding are added to at once.
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_deterministic_run_repeats_bit_for_bit(memory, precision):
    recipe = small_recipe(small_model(value=ValueConfig("bank", table_memory=memory)), precision=precision)
    recipe.train.deterministic = True
    first, second = (run_ranks(train_rank, 1, recipe.to_dict())[0] for _ in range(2))
    assert first == second


@pytest.mark.skipif(not has_gpu(), reason="compares a GPU with the CPU")
@pytest.mark.parametrize("memory", ["device", "host"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_trains_as_the_cpu_does(memory, compile):
    recipe = small_recipe(small_model(value=ValueConfig("bank", table_memory=memory)))
    recipe.train.compile = compile
    on_gpu = run_ranks(train_rank, 1, recipe.to_dict())[0]
    recipe.train.compile = False
    on_cpu = run_ranks(cpu_rank, 1, recipe.to_dict())[0]
    assert on_gpu[0][:2] == pytest.approx(on_cpu[0][:2], rel=1e-5)
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-3)
    assert on_gpu[1] != on_cpu[1], "bit for bit the same: one device against itself?"


def cpu_rank(rank, world_size, recipe_dict):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return train_rank(rank, world_size, recipe_dict)


def two_on_one_rank(rank, world_size, visible):
    """What is said when both ranks see one GPU."""
    from bov_megatron.errors import LaunchError
    from bov_megatron.parallel import process_groups

    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        process_groups.initialize(small_recipe(small_model()), rank, world_size, rank)
    except LaunchError as error:
        return str(error)
    return "nothing"


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with one GPU")
def test_ranks_that_share_a_gpu_are_refused():
    for said in run_ranks(two_on_one_rank, 2, os.environ.get("CUDA_VISIBLE_DEVICES", "0"), timeout=120):
        assert "start as many ranks on a node as it has GPUs" in said
