"""The optimizer on one process: what it reads, refuses, and leaves alone."""

import math

import pytest
import torch
from torch import nn

from bov_megatron.optim.optimizer import BovOptimizer
from bov_megatron.parallel.parameter import LocalParameter, unfuse
from bov_megatron.recipe.parameters import ParameterSpec
from tests.support.sharded_model import TOTAL_STEPS, ShardedModel, advance, recipe, weights


def make(bf16=False, **optimizer):
    model = ShardedModel(1, 0, None, torch.bfloat16 if bf16 else torch.float32)
    return model, BovOptimizer(model.local_parameters, recipe(bf16=bf16, **optimizer), TOTAL_STEPS)


def test_every_weight_moves_by_its_kind_s_algorithm():
    model, optimizer = make()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    advance(model, optimizer, 1)
    lr = {kind: settings.lr / 2 for kind, settings in optimizer.settings.items()}  # first of two warmup steps
    for key, parameter in model.named_parameters():
        kind, moved = model.weights[key].kind, parameter.detach() - before[key]
        assert moved.abs().max() > 0, key
        if kind != "matrix":  # AdamW's first step is lr in every element, but for decay
            decay = optimizer.settings[kind].weight_decay * lr[kind] * before[key]
            step = (moved + decay)[: model.weights[key].shape[0]].abs()
            torch.testing.assert_close(step, torch.full_like(step, lr[kind]), rtol=1e-3, atol=1e-6)
    assert {m.shard.local.kind for m in optimizer.muon.matrices} == {"matrix"}
    assert {p.local.kind for p in optimizer.adamw_parameters} == {w.kind for w in weights()} - {"matrix"}


@pytest.mark.parametrize("key", ["embedding", "table", "output", "gamma", "a", "smear_gate"])
def test_adamw_follows_its_formula_over_steps(key):
    """Every kind: a step count shared by all would be right for the first alone."""
    model, optimizer = make(eps=1e-8)
    parameter = model.get_parameter(key)
    kind = model.weights[key].kind
    settings = optimizer.settings[kind]
    weight = parameter.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        model.set_gradients(step - 1)
        gradient = parameter.main_grad.double()
        lr = optimizer.learning_rates()[kind]
        optimizer.step()
        (beta1, beta2), decay = settings.betas, settings.weight_decay
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        weight *= 1 - lr * decay
        weight -= lr * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_padding_rows_of_the_vocabulary_stay_zero():
    for bf16 in (False, True):
        model, optimizer = make(bf16=bf16)
        advance(model, optimizer, 5)
        for key, weight in model.weights.items():
            if weight.vocabulary:
                padding = getattr(model, key)[weight.shape[0] :]
                assert padding.numel() and not padding.any(), key


def test_bf16_weights_follow_fp32_main_weights():
    model, optimizer = make(bf16=True, matrix_lr=1e-5, embedding_lr=1e-6)
    before = model.embedding.detach().clone()
    advance(model, optimizer, 8)
    mains = {p.local.qualified_name: p.main for p in optimizer.parameters}
    for key, parameter in model.named_parameters():
        assert mains[key].dtype == torch.float32
        assert torch.equal(parameter, mains[key].bfloat16()), key
    # Steps far below bf16's resolution accumulate in the main weights, not in the weights.
    changed = (mains["embedding"] - before.float()).abs() > 0
    assert changed[: len(changed) // 2].float().mean() > 0.99
    assert torch.equal(model.embedding, before) or (model.embedding != before).float().mean() < 0.1


def test_reload_takes_weights_written_from_outside():
    model, optimizer = make(bf16=True)
    with torch.no_grad():
        model.up.fill_(0.5)
    optimizer.reload_model_params()
    model.set_gradients(0)
    optimizer.step()
    assert (model.up - 0.5).abs().max() < 0.1, "one step from the weights written, not from the old ones"


def test_a_fused_matrix_trains_as_its_parts_would():
    model, optimizer = make()
    weight = model.weights["qkv"]
    pieces = zip("qkv", unfuse(model.qkv.detach(), weight.split), strict=True)
    described = [described_parameter(nn.Parameter(piece), f"model.{name}") for name, piece in pieces]
    parts = [local.parameter for local in described]
    apart = BovOptimizer(described, recipe(), TOTAL_STEPS)
    for step in range(3):
        model.set_gradients(step)
        for parameter, piece in zip(parts, unfuse(model.qkv.main_grad, weight.split), strict=True):
            parameter.grad = piece
        optimizer.step()
        apart.step()
    for parameter, piece in zip(parts, unfuse(model.qkv.detach(), weight.split), strict=True):
        assert torch.equal(parameter, piece)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model, optimizer = make(bf16=True)
    advance(model, optimizer, 1)
    before = [tensor.clone() for tensor in all_tensors(model, optimizer)]
    model.set_gradients(1)
    model.gamma.main_grad.fill_(bad)
    norm = optimizer.gradient_norm()
    assert norm.shape == () and norm.dtype == torch.float64 and norm.isnan()
    result = optimizer.step()
    assert not result.applied and math.isnan(result.grad_norm) and optimizer.step_count == 1
    assert all(torch.equal(a, b) for a, b in zip(before, all_tensors(model, optimizer), strict=True))
    advance(model, optimizer, 1)
    assert optimizer.step_count == 2


def all_tensors(model, optimizer):
    state = [tensor for _, _, tensor in optimizer.state_tensors()] + [t for *_, t in optimizer.second_moments()]
    return [parameter.detach() for parameter in model.parameters()] + state


def test_norm_and_clipping_are_torch_s():
    model, optimizer = make(clip_grad=0.25)
    model.set_gradients(0)
    copies = [nn.Parameter(torch.zeros_like(p)) for p in model.parameters()]
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        copy.grad = parameter.main_grad.clone()
    norm = nn.utils.clip_grad_norm_(copies, 0.25)
    found = optimizer.gradient_norm()
    result = optimizer.step(float(found))
    assert result.applied and result.grad_norm == float(found)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.main_grad, copy.grad)


def test_grad_serves_where_there_is_no_main_grad():
    one, other = make(), make()
    one[0].set_gradients(0)
    other[0].set_gradients(0)
    for parameter in other[0].parameters():
        parameter.grad = parameter.main_grad
        del parameter.main_grad
    one[1].step()
    other[1].step()
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    other[0].zero_grad()
    assert all(parameter.grad is None for parameter in other[0].parameters())
    with pytest.raises(RuntimeError, match="parameter embedding has no gradient"):
        other[1].step()


def described_parameter(parameter, *names, kind="matrix", split=None):
    """Of a model of one rank."""
    specs = tuple(ParameterSpec(name, tuple(parameter.shape), kind) for name in names)
    return LocalParameter("weight", parameter, specs, fused_split=split)


@pytest.mark.parametrize(
    "shape, description, message",
    [
        ((8, 4), {"kind": None}, r"parameter weight: kind=None; it must be one of matrix, "),
        ((8, 4), {"kind": "scalar"}, "kind='scalar'"),
        ((8, 4), {"names": ()}, r"fused_split=None needs as many canonical names"),
        ((8, 4), {"split": (2, 1)}, r"fused_split=\(2, 1\) needs as many canonical names"),
        ((8, 4), {"names": ("q", "k"), "split": (2, 1)}, "8 rows do not divide into groups"),
        ((), {"kind": "coefficient"}, r"needs shape \[1\]"),
        ((8,), {}, "needs 2 dimensions"),
        ((8, 4), {"dtype": torch.float16}, "float16; train in float32 or bfloat16"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(shape, description, message):
    description = dict(description)
    names, dtype = description.pop("names", ("w",)), description.pop("dtype", torch.float32)
    with pytest.raises(ValueError, match=message):
        described_parameter(nn.Parameter(torch.zeros(shape, dtype=dtype)), *names, **description)


def test_state_of_another_model_is_refused():
    model, optimizer = make()
    good = {"step": 3, "state": {f"{n}/{p.local.names[0]}": t for n, p, t in optimizer.state_tensors()}}
    with pytest.raises(ValueError, match="optimizer state lacks 'second_moment/model.layers.0.self_attn.q_proj"):
        optimizer.load_state_dict(good)
    name = "exp_avg/model.embed_tokens.weight"
    good["state"] |= {f"second_moment/{c}": t for *_, c, t in optimizer.second_moments()}
    good["state"][name] = good["state"][name][:-1]
    with pytest.raises(ValueError, match=r"'exp_avg/model.embed_tokens.weight': found \(560, 128\), need \(561, 128\)"):
        optimizer.load_state_dict(good)
    assert optimizer.step_count == 0
    with pytest.raises(ValueError, match="no tensor for parameter qkv"):
        optimizer.sharded_state_dict({})
