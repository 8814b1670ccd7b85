"""Blockwise window attention shows each query exactly the keys of its window, at any length."""

import pytest
import torch

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

    distance = torch.arange(length)[:, None] - torch.arange(length)
    wide_key, wide_value = (x.repeat_interleave(4 // groups, 1) for x in (key, value))
    scores = (query @ wide_key.mT / 4).masked_fill((distance < 0) | (distance > window), float("-inf"))
    expected = scores.softmax(-1) @ wide_value
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (query, key, value), grad))
