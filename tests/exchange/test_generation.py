"""Generation in every mode, what the model is called with, and what it refuses. Also run on transformers 5."""

import pytest
import torch
from transformers import DynamicCache

from bov_megatron.exchange.hf.modeling_bov import BovCache
from tests.support.small_models import VARIANTS, random_ids, small_model

PAD = 0
LENGTHS = (9, 4, 1)


def padded_rows(lengths=LENGTHS):
    """`(ids, attention_mask)` of rows padded on the left."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return random_ids(len(lengths), width).masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_is_the_same_without_cache(variant, num_beams):
    model = small_model(VARIANTS[variant])
    ids, mask = padded_rows()
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=num_beams, pad_token_id=PAD)
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_assistant_changes_nothing(variant):
    """Its guesses that are rejected are cropped from both caches."""
    model, assistant = small_model(VARIANTS[variant]), small_model(VARIANTS["bank"], seed=1)
    ids = random_ids(1, 6)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, assistant_model=assistant, **options))


def test_prefill_in_chunks_changes_nothing():
    model = small_model(VARIANTS["bank"])
    ids, mask = padded_rows()
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, prefill_chunk_size=4, **options))


def test_a_conversation_goes_on_from_its_cache():
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 6)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    first = model.generate(ids, return_dict_in_generate=True, **options)
    cache = first.past_key_values
    assert isinstance(cache, BovCache) and cache.get_seq_length() == 10
    ids = torch.cat([first.sequences, random_ids(1, 3, seed=2)], dim=1)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@torch.no_grad()
def test_the_cache_has_two_names():
    model, ids = small_model(VARIANTS["bank"]), random_ids(2, 8)
    whole = model(ids).logits[:, 5:]
    for name in ("cache", "past_key_values"):
        for called in (model, model.model):
            cache = BovCache(model.config)
            called(ids[:, :5], **{name: cache})
            assert cache.get_seq_length() == 5
        torch.testing.assert_close(model(ids[:, 5:], **{name: cache}).logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="two names for one argument"):
        model(ids, cache=BovCache(model.config), past_key_values=BovCache(model.config))
    with pytest.raises(ValueError, match="is a DynamicCache, but this model needs a BovCache"):
        model(ids, cache=DynamicCache())


def test_unknown_arguments_are_refused():
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 4)
    for called in (model, model.model):
        with pytest.raises(TypeError, match="cu_seq_lens_q"):
            called(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="attention_maks"):
        model.generate(ids, attention_maks=torch.ones_like(ids), max_new_tokens=2)


@pytest.mark.parametrize("wrong", [61, -1])
def test_an_unknown_id_is_named(wrong):
    model, ids = small_model(VARIANTS["bank"]), random_ids(2, 4)
    ids[1, 2] = wrong
    for called in (model, model.generate):
        with pytest.raises(
            ValueError, match=rf"input_ids contains {wrong}, but this model's ids are 0 to 60; .*resize_"
        ):
            called(ids)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple():
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 4)
    outputs = model(ids, labels=ids)
    found = model(ids, labels=ids, return_dict=False)
    assert isinstance(found, tuple) and len(found) == 3 and isinstance(found[2], BovCache)
    assert torch.equal(found[0], outputs.loss) and torch.equal(found[1], outputs.logits)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple) and isinstance(model.model(ids), tuple)
    assert torch.equal(model(ids, labels=ids, return_dict=True).loss, outputs.loss)


@torch.no_grad()
def test_attentions_are_the_weights_that_attention_uses():
    """With a padded row, on a prompt and on a step with the cache: weights times cached values give its output."""
    model = small_model(VARIANTS["projection"])
    ids, mask = padded_rows()
    added = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *arguments: added.append(arguments[-1]))
    cache = BovCache(model.config)
    for new in (slice(0, 8), slice(8, 9)):
        added.clear()
        attentions = model(
            ids[:, new], attention_mask=mask[:, : new.stop], past_key_values=cache, output_attentions=True
        ).attentions
        assert len(attentions) == 4
        for attention, weights, values, expected in zip(
            (layer.self_attn for layer in model.model.layers), attentions, cache.layers, added, strict=False
        ):
            assert weights.shape == (3, 4, new.stop - new.start, new.stop)
            mixed = weights @ values.values.repeat_interleave(2, dim=1)
            found = attention.o_proj(mixed.transpose(1, 2).flatten(2))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generation_returns_attentions_and_hidden_states():
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 6)
    found = model.generate(
        ids, max_new_tokens=3, do_sample=False, pad_token_id=PAD,
        return_dict_in_generate=True, output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    assert [len(step) for step in found.attentions] == [4] * 3
    assert [step[0].shape[-1] for step in found.attentions] == [6, 7, 8]
    assert [len(step) for step in found.hidden_states] == [5] * 3


@torch.no_grad()
def test_the_usual_arguments_may_be_none():
    """As PEFT passes them."""
    names = ("attention_mask", "position_ids", "inputs_embeds", "labels", "use_cache", "output_attentions")
    names += ("output_hidden_states", "return_dict")
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 4)
    assert torch.equal(model(input_ids=ids, **dict.fromkeys(names)).logits, model(ids).logits)
