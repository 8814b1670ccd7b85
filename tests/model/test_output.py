"""The loss from hidden states: against plain PyTorch and Megatron's own, in every layout, and in bounded memory."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.distributed import run_ranks
from tests.support.parity import relative_error

VOCAB, HIDDEN, LENGTH, BATCH, CAP = 300, 32, 48, 3, 15.0
"""The vocabulary pads to 384 at TP 1, and to 512 at TP 4, whose last rank then has padding alone."""


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits of a few times the soft cap, and a different gradient for each token."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(LENGTH, BATCH, HIDDEN, generator=generator),
        torch.randn(VOCAB, HIDDEN, generator=generator),
    )
    return {
        "hidden": hidden.to(dtype),
        "weight": 3 * weight.to(dtype),
        "labels": torch.randint(VOCAB, (BATCH, LENGTH), generator=generator),
        "gradient": torch.rand(BATCH, LENGTH, generator=generator),
    }


def plain(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Loss per token and gradients of hidden states and weight, by plain PyTorch in fp64."""
    given = inputs(dtype)
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight.t()
    if dtype == torch.bfloat16:
        logits = logits + (logits.bfloat16().double() - logits).detach()  # as stored; not rounded in between
    capped = CAP * torch.tanh(logits / CAP)
    loss = F.cross_entropy(capped.permute(1, 2, 0), given["labels"], reduction="none")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), given["gradient"].double())


def output_rank(rank, world_size, cases):
    """Per case of (dtype, sequence parallelism): loss and this rank's gradients by the layer, then by Megatron."""
    from benchmarks.loss import loss_recipe, make_output_layer, megatron_loss
    from bov_megatron.model import output
    from bov_megatron.parallel import process_groups

    output.CHUNK_ELEMENTS = {"cpu": 4000}  # several chunks, the last one smaller
    recipe = loss_recipe(quick=True)
    recipe.model.vocab_size, recipe.model.hidden_size = VOCAB, HIDDEN
    recipe.parallel.tensor_model_parallel_size = world_size
    process_groups.initialize(recipe, rank, world_size)
    results = []
    for dtype, sequence_parallel in cases:
        recipe.train.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        recipe.parallel.sequence_parallel = sequence_parallel
        layer, given = make_output_layer(recipe), inputs(dtype)
        rows = torch.nn.functional.pad(given["weight"], (0, 0, 0, recipe.padded_vocab_size() - VOCAB), value=1.0)
        layer.weight.data = rows.chunk(world_size)[rank].clone()
        hidden = given["hidden"].chunk(world_size if sequence_parallel else 1)[rank if sequence_parallel else 0]
        hidden = hidden.clone().requires_grad_()
        both = []
        for compute in (layer, lambda *tensors, layer=layer: megatron_loss(layer, *tensors)):
            loss = compute(hidden, given["labels"])
            gradients = torch.autograd.grad(loss, (hidden, layer.weight), given["gradient"])
            with torch.no_grad():
                assert torch.equal(compute(hidden, given["labels"]), loss)
            both.append((loss.detach(), *gradients))
        results.append(both)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_are_those_of_plain_pytorch_and_of_megatron(world_size):
    cases = [(dtype, split) for dtype in (torch.float32, torch.bfloat16) for split in {False, world_size > 1}]
    by_rank = run_ranks(output_rank, world_size, cases)
    for number, (dtype, sequence_parallel) in enumerate(cases):
        expected = plain(dtype)
        ours, megatrons = (
            _whole([results[number][which] for results in by_rank], sequence_parallel) for which in (0, 1)
        )
        losses, others = (2e-6, 3e-6) if dtype == torch.float32 else (2e-6, 2e-2)
        for tolerance, found, theirs, exact in zip((losses, others, others), ours, megatrons, expected, strict=True):
            assert relative_error(found, exact) < tolerance
            assert relative_error(found, theirs) < tolerance
        # No farther from exact than Megatron's: what is rounded to bf16 is the same.
        for found, theirs, exact in zip(ours[1:], megatrons[1:], expected[1:], strict=True):
            assert relative_error(found, exact) < 1.2 * relative_error(theirs, exact) + 1e-6


def _whole(parts, sequence_parallel):
    losses, hidden, weight = zip(*parts, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks disagree about the loss"
    if not sequence_parallel:
        assert all(torch.equal(gradient, hidden[0]) for gradient in hidden)
    rows = torch.cat(weight)
    assert not rows[VOCAB:].any(), "padding has a gradient"
    return losses[0], torch.cat(hidden) if sequence_parallel else hidden[0], rows[:VOCAB]


def memory_rank(rank, world_size):
    """Peak bytes of forward and backward, ours and Megatron's, and bytes of the logits in bf16."""
    from benchmarks.loss import loss_recipe, make_output_layer, megatron_loss
    from benchmarks.memory import peak_bytes
    from bov_megatron.parallel import process_groups

    recipe = loss_recipe(quick=True)
    process_groups.initialize(recipe, rank, world_size)
    layer = make_output_layer(recipe)
    hidden = torch.randn(512, 2, recipe.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(recipe.model.vocab_size, (2, 512))
    ours = peak_bytes(lambda: layer(hidden, labels).mean().backward())
    megatrons = peak_bytes(lambda: megatron_loss(layer, hidden, labels).mean().backward())
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss = layer(hidden, labels).mean()
        loss.backward(retain_graph=True)
        loss.backward()
    return ours, megatrons, hidden.size(0) * hidden.size(1) * len(layer.weight) * 2


def test_logits_exist_once_in_the_models_precision():
    ours, megatrons, logits = run_ranks(memory_rank, 1)[0]
    assert logits < ours < 1.5 * logits
    assert megatrons > 3 * ours
