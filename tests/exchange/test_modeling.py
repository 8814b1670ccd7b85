"""The exported model computes what the paper's reference does, for every value source."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bov_megatron.exchange.export import hf_config
from bov_megatron.exchange.hf import configuration_bov
from bov_megatron.exchange.hf.configuration_bov import BovConfig
from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM
from bov_megatron.recipe import ValueConfig, value_sources
from bov_megatron.recipe.parameters import parameter_specs
from tests.support.golden_files import GOLDEN_NAMES, load_golden
from tests.support.small_models import VARIANTS, random_ids, small_model, small_model_config


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits_loss_and_gradients(name):
    golden = load_golden(name)
    model = BovForCausalLM(hf_config(golden.model))
    model.load_state_dict(golden.weights, strict=True)
    logits = model(golden.tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), golden.targets.flatten())
    loss.backward()
    torch.testing.assert_close(loss, golden.loss, rtol=1e-6, atol=0)
    assert relative(logits[:, golden.positions], golden.logits) < 1e-5
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == golden.gradients.keys()
    errors = {key: relative(gradients[key], expected) for key, expected in golden.gradients.items()}
    assert max(errors.values()) < 1e-5, {key: error for key, error in errors.items() if error >= 1e-5}


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_the_canonical_list(variant):
    model = small_model_config(VARIANTS[variant])
    state = BovForCausalLM(hf_config(model)).state_dict()
    specs = {spec.name: spec.shape for spec in parameter_specs(model)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == specs


def attention_output(model, ids):
    """What the last layer's attention adds to the residual stream."""
    found = []
    hook = model.model.layers[-1].self_attn.register_forward_hook(lambda *arguments: found.append(arguments[-1]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0]


def pair(source, other, **values):
    """Two models that differ in the last layer's value source alone, with the weights they share."""
    one = small_model(ValueConfig(source=source, target_layers=[3]))
    two = small_model(ValueConfig(source=other, target_layers=[3]))
    state = one.state_dict()
    two.load_state_dict({name: state.get(name, tensor) for name, tensor in two.state_dict().items()})
    attention = one.model.layers[-1].self_attn
    with torch.no_grad():
        for name, value in values.items():
            getattr(attention, name).fill_(value)
    return one, two


SUMS = {
    "projection_plus_first_layer": "first_layer",
    "projection_plus_embedding": "embedding_projection",
    "projection_plus_bank": "bank",
}


@pytest.mark.parametrize("source", SUMS)
def test_a_sum_is_the_sum_of_its_two_sources(source):
    """Attention is linear in its values, and the two sources alone are held by golden tensors."""
    ids = random_ids(2, 20)
    both, projection = pair(source, "projection", projection_coefficient=0.3, source_coefficient=-0.7)
    alone = pair(source, SUMS[source])[1]
    with torch.no_grad():
        alone.model.layers[-1].self_attn.source_coefficient.fill_(-0.7)
    expected = 0.3 * attention_output(projection, ids) + attention_output(alone, ids)
    torch.testing.assert_close(attention_output(both, ids), expected, rtol=1e-5, atol=1e-5)

    fixed = small_model(ValueConfig(source=source, target_layers=[3], coefficient="fixed"))
    halves, _ = pair(source, "projection", projection_coefficient=0.5, source_coefficient=0.5)
    fixed.load_state_dict({name: halves.state_dict()[name] for name in fixed.state_dict()})
    torch.testing.assert_close(attention_output(fixed, ids), attention_output(halves, ids))


def test_scaled_projection_scales():
    ids = random_ids(2, 20)
    scaled, projection = pair("scaled_projection", "projection", source_coefficient=-1.7)
    expected = -1.7 * attention_output(projection, ids)
    torch.testing.assert_close(attention_output(scaled, ids), expected, rtol=1e-5, atol=1e-5)


def test_window_counts_keys_to_the_left_besides_the_token_itself():
    model = small_model(ValueConfig(source="projection"), windows=(3,), num_layers=1, window_pattern="S")
    ids = random_ids(1, 12)
    with torch.no_grad():
        model.model.smear.scale.zero_()
        logits = model(ids).logits[0, 8]
        for changed, same in ((4, True), (5, False)):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 61
            assert torch.equal(model(other).logits[0, 8], logits) == same


def test_grouped_queries_equal_repeated_key_and_value_heads():
    value = ValueConfig(source="bank", target_layers="last_two_thirds")
    grouped = small_model(value)
    full = small_model(value, num_query_groups=4)
    state = grouped.state_dict()
    for name, tensor in full.state_dict().items():
        found = state[name]
        if "k_proj" in name or "v_proj" in name:
            found = found.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
        elif "value_table" in name:
            found = found.unflatten(1, (2, 6)).repeat_interleave(2, 1).flatten(1, 2)
        tensor.copy_(found)
    ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(full(ids).logits, grouped(ids).logits, rtol=1e-4, atol=1e-5)


def test_labels_are_shifted_and_ignored_where_minus_100():
    model = small_model(VARIANTS["bank"])
    ids = random_ids(2, 20)
    labels = ids.masked_fill(torch.arange(20) < 5, -100)
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = F.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
        last = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(last, output.logits[:, -1:])


def test_bfloat16_stays_close():
    model = small_model(VARIANTS["bank"])
    ids = random_ids(2, 20)
    with torch.no_grad():
        exact = model(ids).logits
        rounded = model.to(torch.bfloat16)(ids)
    assert rounded.logits.dtype == torch.float32
    assert relative(rounded.logits, exact) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_source": "banks"}, "value_source='banks' is not one of"),
        ({"value_coefficient": "free"}, "value_coefficient='free'"),
        ({"value_table": "two"}, "value_table='two'"),
        ({"windows": [4]}, "windows has 1 entries"),
        ({"value_source": "bank", "target_layers": [12]}, r"target_layers=\[12\]: layers are 0 to 11"),
        ({"value_source": "first_layer", "target_layers": [0, 1]}, "target_layers contains 0"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        BovConfig(**fields)


def test_facts_of_value_sources_are_the_recipes():
    records = {name: dataclasses.asdict(facts) for name, facts in value_sources.VALUE_SOURCES.items()}
    assert records == configuration_bov.VALUE_SOURCES


def test_bad_inputs_are_refused():
    model = small_model(VARIANTS["bank"])
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="including cached ones, which it must cover too"):
        model(random_ids(1, 4), attention_mask=torch.ones(1, 3))
