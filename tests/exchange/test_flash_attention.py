"""FlashAttention-2 through transformers' own interface, with the package's two functions in plain PyTorch.

Everything but the kernel is what runs on a GPU: layouts, windows, unpadding. Also on transformers 5.
"""

import inspect

import pytest
import torch
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward

from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM
from tests.support.flash_attention import flash_attn_func, flash_attn_varlen_func
from tests.support.small_models import VARIANTS, random_ids, small_model

PAD, NAME, WINDOWS = 0, "flash_attention_in_pytorch", (3, 5, 3, 64)


@pytest.fixture
def calls(monkeypatch):
    """Makes NAME an attention implementation; lists the windows and shapes that the package is called with."""
    found = []

    def recorded(function):
        def call(q, k, v, *args, **options):
            found.append((function.__name__, q.shape, k.shape, options.get("window_size", (-1, -1))[0]))
            return function(q, k, v, *args, **options)

        call.__signature__ = inspect.signature(function)
        return call

    utils = modeling_flash_attention_utils
    functions = [recorded(flash_attn_func), recorded(flash_attn_varlen_func)]
    functions += [None] if hasattr(utils, "_flash_with_kvcache_fn") else []
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: (*functions, utils._pad_input, utils._unpad_input))
    for name in [name for name in vars(utils) if name.endswith("_fn") or name == "_loaded_implementation"]:
        monkeypatch.setattr(utils, name, None)  # what an earlier call has kept
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, flash_attention_forward)
    return found


def pair(variant, **options):
    """A model with SDPA, and the same with flash attention."""
    expected, model = (small_model(VARIANTS[variant], windows=WINDOWS, **options) for _ in range(2))
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME
    return expected, model


def left_padded():
    mask = torch.stack([(torch.arange(17) >= 17 - length).long() for length in (17, 6, 1)])
    return random_ids(3, 17).masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_sdpa(calls, variant):
    expected, model = pair(variant)
    ids, mask = left_padded()
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert {name for name, *_ in calls} == {"flash_attn_func"}
    found = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected(ids, attention_mask=mask).logits[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["bank", "first_layer"])
def test_tokens_equal_those_of_sdpa(calls, variant):
    expected, model = pair(variant)
    ids, mask = left_padded()
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    for more in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(ids, **options, **more), expected.generate(ids, **options, **more))


@pytest.mark.parametrize("variant", ["bank_every", "first_layer", "projection"])
@torch.no_grad()
def test_a_window_is_as_many_keys_to_the_left_in_every_way(calls, variant):
    """At once, in pieces with a cache, one by one; keys beyond the window are not even passed on."""
    expected, model = pair(variant)
    ids = random_ids(2, 24)
    whole = expected(ids).logits
    torch.testing.assert_close(model(ids).logits, whole, rtol=1e-5, atol=1e-5)
    assert [window for *_, window in calls] == [3, 5, 3, -1], "flash_attn doesn't count the query's own position"
    cache, found = None, []
    for piece in ids.split([9, 4, *[1] * 11], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert [keys[1] for _, _, keys, _ in calls[-4:]] == [4, 6, 4, 24]


@torch.no_grad()
def test_left_padding_in_pieces(calls):
    """Rows of which a piece has no token, or some."""
    expected, model = pair("bank")
    ids, mask = left_padded()
    cache, found, length = None, [], 0
    for piece in ids.split([5, 9, 1, 1, 1], dim=1):
        length += piece.size(1)
        output = model(piece, attention_mask=mask[:, :length], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    whole = expected(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


def test_assisted(calls):
    expected, model = pair("bank")
    _, assistant = pair("projection")
    ids = random_ids(1, 9)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected.generate(ids, **options))


@pytest.mark.parametrize("variant", ["bank", "gated_shared", "first_layer"])
def test_gradients_equal_those_of_sdpa(calls, variant):
    expected, model = pair(variant)
    ids, mask = left_padded()
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)  # what padding predicts is another thing in each
    model.gradient_checkpointing_enable()
    for each in (expected, model):
        each.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bank_device", ["cpu", "mmap"])
@torch.no_grad()
def test_bfloat16_and_tables_outside_the_device(calls, bank_device, tmp_path):
    small_model(VARIANTS["bank"], windows=WINDOWS).save_pretrained(tmp_path)
    options = dict(dtype=torch.bfloat16, bank_device=bank_device)
    expected = BovForCausalLM.from_pretrained(tmp_path, **options)
    model = BovForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME, **options)
    ids, mask = left_padded()
    found = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected(ids, attention_mask=mask).logits[mask.bool()], rtol=0.1, atol=0.2)
    assert calls and {name for name, *_ in calls} == {"flash_attn_varlen_func"}


def test_what_is_refused(calls, tmp_path):
    _, model = pair("bank")
    with pytest.raises(ValueError, match="output_attentions: attn_implementation='flash_.*' computes no"):
        model(random_ids(1, 4), output_attentions=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but .* installed"):
        BovForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
