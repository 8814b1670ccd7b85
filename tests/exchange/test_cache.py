"""Generation with the cache equals generation without, and bank layers keep no values in it."""

import pytest
import torch
from transformers import DynamicCache

from bov_megatron.evaluation.core.prompts import Option, Question
from bov_megatron.evaluation.core.scorers import TransformersScorer
from tests.support.small_models import VARIANTS, random_ids, small_model

PAD = 0


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pieces_equal_the_whole(variant):
    model, ids = small_model(VARIANTS[variant]), random_ids(2, 24)
    whole = model(ids).logits
    cache, found = None, []
    for piece in ids.split([9, 4, *[1] * 11], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    assert_same(torch.cat(found, 1), whole)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_left_padded_rows_equal_single_rows(variant):
    model = small_model(VARIANTS[variant])
    rows = [random_ids(1, length, seed=length)[0] for length in (17, 6, 1)]
    padded = torch.stack([torch.cat([torch.full((17 - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([(torch.arange(17) >= 17 - len(row)).long() for row in rows])
    logits = model(padded, attention_mask=mask).logits
    for i, row in enumerate(rows):
        assert_same(logits[i, 17 - len(row) :], model(row[None]).logits[0])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        assert together[i, 17:].tolist() == alone[0, len(row) :].tolist()


def test_scores_behind_shared_prefixes_equal_whole_sequences():
    """As CORE computes them, from a cache whose rows are repeated."""
    ids = random_ids(3, 14).tolist()
    shared = [Option([*ids[0][:9], *ending], 9) for ending in (ids[0][9:], ids[1][:3], ids[1][3:4])]
    other = [Option([*ids[2][:6], *ending], 7) for ending in (ids[2][6:9], ids[2][9:])]
    questions = [Question(None, index, options, 0) for index, options in enumerate((shared, other))]
    scorer = TransformersScorer(small_model(VARIANTS["bank"]))
    whole = [
        score for row in scorer.score([Question(None, 0, [option], 0) for option in shared + other]) for score in row
    ]
    behind = [score for row in scorer.score(questions) for score in row]
    assert [score.nats for score in behind] == pytest.approx([score.nats for score in whole], rel=1e-5)


WAYS = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling_several": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.0, "top_k": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_the_same_without_cache(variant, way):
    model, ids = small_model(VARIANTS[variant]), random_ids(2, 7)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(ids, use_cache=use_cache, max_new_tokens=10, pad_token_id=PAD, **WAYS[way]))
    assert torch.equal(*found)
    assert found[0].shape[1] == 17


def test_prompt_lookup_rolls_the_cache_back():
    """Speculative tokens that are rejected are cropped from the cache, ids included."""
    model = small_model(VARIANTS["bank"])
    ids = random_ids(1, 4).repeat(1, 4)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=60)
    plain = model.generate(ids, **options)
    guessed = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert plain.shape[1] > 20
    assert torch.equal(plain, guessed)


@pytest.mark.parametrize("variant", ["bank", "bank_every", "bank_listed_shared_fixed", "first_layer"])
@torch.no_grad()
def test_target_layers_keep_no_values(variant):
    model, ids = small_model(VARIANTS[variant]), random_ids(3, 10)
    cache = model(ids, use_cache=True).past_key_values
    projecting = 0
    for number, layer in enumerate(cache.layers[:4]):
        assert layer.keys.shape == (3, 2, 10, 6)
        is_target = number in model.config.target_layers
        assert layer.values.shape == (3, 2, 10, 0 if is_target else 6)
        projecting += not is_target
    assert cache.layers[4].keys.dtype == torch.int32 and cache.layers[4].keys.squeeze().equal(ids.int())
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept == 3 * 10 * (4 * 12 * 4 + projecting * 12 * 4 + 4)


@torch.no_grad()
def test_cropped_cache_continues():
    model, ids = small_model(VARIANTS["bank"]), random_ids(2, 12)
    cache = model(random_ids(2, 9, seed=7).where(torch.arange(9) >= 6, ids[:, :9]), use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    assert_same(model(ids[:, 6:], past_key_values=cache).logits, model(ids).logits[:, 6:])


def test_other_caches_are_refused():
    model, ids = small_model(VARIANTS["bank"]), random_ids(1, 4)
    with pytest.raises(ValueError, match="cache_implementation='static' doesn't work"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=PAD)
    with pytest.raises(ValueError, match="is a DynamicCache, but this model needs a BovCache"):
        model(ids, past_key_values=DynamicCache())
