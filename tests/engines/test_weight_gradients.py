"""Linear layers add each weight gradient to `main_grad` once, by a product that was seen to add right."""

from unittest import mock

import pytest
import torch

from bov_megatron.model import weight_gradients
from bov_megatron.recipe import ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.parity import (
    batch,
    load_weights,
    my_micro_batches,
    random_weights,
    relative_error,
    small_model,
    small_recipe,
)

STEPS, MICRO_BATCHES = 2, 4
PRODUCT = "wgrad_gemm_accum_fp32"


def exact(input_NI, grad_NO, main_grad_OI):
    """Takes bf16 on a CPU too, as Apex's extension does on a GPU."""
    main_grad_OI.addmm_(grad_NO.float().t(), input_NI.float())


def twice(input_NI, grad_NO, main_grad_OI):
    for _ in range(2):
        exact(input_NI, grad_NO, main_grad_OI)


def dropped(input_NI, grad_NO, main_grad_OI):
    pass


def overwriting(input_NI, grad_NO, main_grad_OI):
    torch.mm(grad_NO.float().t(), input_NI.float(), out=main_grad_OI)


def product_rounded(input_NI, grad_NO, main_grad_OI):
    main_grad_OI += (grad_NO.t() @ input_NI).bfloat16()


def sum_rounded(input_NI, grad_NO, main_grad_OI):
    exact(input_NI, grad_NO, main_grad_OI)
    main_grad_OI.copy_(main_grad_OI.bfloat16())


def beside_the_gradient(input_NI, grad_NO, main_grad_OI):
    """What a release that doesn't write into its argument comes to."""
    exact(input_NI, grad_NO, main_grad_OI.clone())


def without_kernel(input_NI, grad_NO, main_grad_OI):
    raise NotImplementedError("Could not run 'aten::addmm.dtype_out' with arguments from the 'CPU' backend")


def without_argument(input_NI, grad_NO, main_grad_OI):
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


WRONG = (twice, dropped, overwriting, product_rounded, sum_rounded, beside_the_gradient, without_kernel)
WRONG += (without_argument,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_taken_only_if_it_adds_right(dtype, monkeypatch):
    for product, right in ((exact, True), *((wrong, False) for wrong in WRONG)):
        monkeypatch.setattr(weight_gradients, PRODUCT, product)
        assert weight_gradients.adds_exactly(dtype) == right, product.__name__


def test_torch_adds_right_in_fp32():
    assert weight_gradients.adds_exactly(torch.float32)


def gradients_rank(rank, world_size, cases):
    """Per case, products that were added and, for each step, the largest error of any gradient against autograd's on
    the whole batch, without data-parallel wrapper and micro-batches."""
    return [_gradients(rank, world_size, *case) for case in cases]


def _gradients(rank, world_size, recipe_dict, tried=None, used=None, hook=None):
    """`tried` is the product when the engine is built, `used` the one in its steps."""
    from bov_megatron.engines.data_parallel import DataParallel
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    own = getattr(weight_gradients, PRODUCT)
    process_groups.initialize(recipe, rank, world_size)
    # What nobody writes, as the tensors that the hook throws away, is nan.
    torch.use_deterministic_algorithms(True)
    with (
        mock.patch.object(weight_gradients, PRODUCT, tried or own),
        mock.patch.object(DataParallel, "_make_backward_post_hook", hook or DataParallel._make_backward_post_hook),
    ):
        engine = MegatronEngine(recipe)
    whole = MegatronEngine(recipe, with_optimizer=False)
    errors = []
    for each in (engine, whole):
        load_weights(each, random_weights(recipe.model))
    for step in range(STEPS):
        with mock.patch.object(weight_gradients, PRODUCT, side_effect=used or tried or own) as product:
            engine.forward_backward(my_micro_batches(recipe, batch(step)))
        whole.model.zero_grad()
        whole.model(batch(step)[:, :-1].contiguous(), batch(step)[:, 1:].contiguous()).mean().backward()
        pairs = zip(engine.model.parameters(), whole.model.parameters(), strict=True)
        of_step = [relative_error(found.main_grad, expected.grad) for found, expected in pairs]
        errors.append(torch.tensor(of_step).max().item())  # nan where any is
    process_groups.shutdown()
    return product.call_count, errors


def recipe_of(source: str, precision: str = "fp32", **layout) -> dict:
    return small_recipe(small_model(value=ValueConfig(source=source)), precision=precision, **layout).to_dict()


def products(per_layer: int, second_passes: int = 0) -> int:
    """Of a step: in four layers and the output layer."""
    return MICRO_BATCHES * (4 * per_layer + second_passes + 1)


def test_gradients_over_micro_batches_are_those_of_the_whole_batch():
    cases = {
        "projection": ((recipe_of("projection"),), products(4)),
        "recomputed": ((recipe_of("projection", recompute="full"),), products(4)),
        # In two of four layers, one matrix is applied twice.
        "applied twice": ((recipe_of("projection_plus_embedding"),), products(4, second_passes=4)),
        "a product that is wrong": ((recipe_of("projection"), overwriting), 0),
    }
    (found,) = run_ranks(gradients_rank, 1, [case for case, _ in cases.values()])
    for name, (count, errors), (_, wanted) in zip(cases, found, cases.values(), strict=True):
        assert count == wanted, name
        assert max(errors) < 1e-5, name


def hook_told_nothing(self, parameter):
    """Adds what it should throw away."""
    from megatron.core.distributed import DistributedDataParallel

    hook = DistributedDataParallel._make_backward_post_hook(self, parameter)

    def telling_nothing(*unused):
        parameter.grad_added_to_main_grad = False
        hook()

    return telling_nothing


def test_gradients_added_twice_dropped_or_made_of_nothing_are_seen():
    recipe = recipe_of("projection")
    mistakes = [(recipe, None, twice), (recipe, None, dropped), (recipe, None, None, hook_told_nothing)]
    (found,) = run_ranks(gradients_rank, 1, mistakes)
    for count, errors in found:
        assert count == products(4)
        assert not min(errors) < 0.9


def test_bf16_gradients_where_the_product_takes_them():
    """On a CPU torch has no such product."""
    recipe = recipe_of("projection", "bf16")
    ((with_product, errors), (without, errors_without)) = run_ranks(
        gradients_rank, 1, [(recipe, exact), (recipe, dropped)]
    )[0]
    assert (with_product, without) == (products(4), 0)
    assert max(errors) < 1.1 * max(errors_without) < 0.05
