"""The Megatron model against the paper's reference implementation (golden tensors), alone and over two ranks."""

import pytest
import torch

from bov_megatron.recipe import ParallelConfig, Recipe, TrainConfig
from tests.support.distributed import run_ranks
from tests.support.golden_files import GOLDEN_NAMES, load_golden
from tests.support.parity import gather_gradients, load_weights, relative_error, worst_gradient


def golden_rank(rank: int, world_size: int, name: str, sequence_parallel: bool, precision: str = "fp32"):
    """Logits at the golden positions, loss and all gradients, from a tensor-parallel model."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    golden = load_golden(name)
    recipe = Recipe(
        model=golden.model,
        parallel=ParallelConfig(tensor_model_parallel_size=world_size, sequence_parallel=sequence_parallel),
        train=TrainConfig(micro_batch_size=2, global_batch_size=2, steps=1, precision=precision),
    )
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    load_weights(engine, golden.weights)
    (wrapped,) = engine.wrapped
    wrapped.zero_grad_buffer()
    loss = wrapped(golden.tokens, golden.targets).mean()
    loss.backward()
    gradients = gather_gradients(engine)
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(engine.model(golden.tokens))
    return loss.item(), gradients, logits[:, golden.positions, : golden.model.vocab_size]


@pytest.mark.parametrize("world_size, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_loss_and_gradients_match_the_reference(name, world_size, sequence_parallel):
    golden = load_golden(name)
    for loss, gradients, logits in run_ranks(golden_rank, world_size, name, sequence_parallel):
        assert loss == pytest.approx(golden.loss.item(), rel=1e-6)
        assert relative_error(logits, golden.logits) < 1e-5
        error, worst = worst_gradient(gradients, golden.gradients)
        assert error < 1e-5, f"gradient of {worst} is off by {error:.1e}"
