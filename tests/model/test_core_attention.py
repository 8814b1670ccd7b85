"""Blockwise window attention shows each query exactly the keys of its window, at any length."""

import pytest
import torch

from bov_megatron.model.context_parallel import stretches
from bov_megatron.model.core_attention import windowed_sdpa


@pytest.mark.parametrize("length", [1, 63, 64, 129, 200, 384])
@pytest.mark.parametrize("window, groups", [(128, 4), (128, 2), (7, 4), (1, 4)])
def test_windows_equal_plain_attention_with_a_mask(length, window, groups):
    generator = torch.Generator().manual_seed(length)
    query, key, value, grad = (
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, groups, groups, 4)
    )
    mixed = windowed_sdpa(query, key, value, window)
    gradients = torch.autograd.grad(mixed, (query, key, value), grad)

    expected = plain_attention(query, key, value, window)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (query, key, value), grad))


def plain_attention(query, key, value, window):
    length, groups = key.size(2), key.size(1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    wide_key, wide_value = (x.repeat_interleave(4 // groups, 1) for x in (key, value))
    scores = (query @ wide_key.mT / 4).masked_fill((distance < 0) | (distance > window), float("-inf"))
    return scores.softmax(-1) @ wide_value


@pytest.mark.parametrize("window", [384, 128, 7])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_stretches_of_queries_see_their_own_windows(window, ranks):
    """Each context-parallel rank's two stretches of queries, against all keys; together, the whole sequence."""
    generator = torch.Generator().manual_seed(ranks)
    query, key, value = (torch.randn(2, n, 384, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    expected, seen = plain_attention(query, key, value, window), []
    for rank in range(ranks):
        for start, stop in stretches(384, rank, ranks):
            mixed = windowed_sdpa(query[:, :, start:stop], key, value, window, start)
            torch.testing.assert_close(mixed, expected[:, :, start:stop])
            seen += range(start, stop)
    assert sorted(seen) == list(range(384))


def test_a_sequence_that_does_not_divide_is_refused():
    """696 of 700 tokens would be covered, and the others silently missing from the loss."""
    with pytest.raises(ValueError, match="sequence of 700 tokens does not divide into the 8 equal chunks of 4 context"):
        stretches(700, 0, 4)
    assert stretches(700, 0, 1) == [(0, 700)]
