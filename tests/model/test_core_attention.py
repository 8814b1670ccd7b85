"""Core attention shows each query exactly the keys of its window, on every kernel that runs here, and never holds
scores; the kernels for GPUs are called as their operators want it."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bov_megatron.model.attention_blocks import attend_in_blocks, blocks
from bov_megatron.model.context_parallel import stretches
from bov_megatron.model.core_attention import attend, choose_kernel, flash, flex, windowed_sdpa

HEADS = 4


def random_inputs(length, groups, batch=2, dim=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, heads, length, dim, generator=generator, dtype=dtype, requires_grad=True)
        for heads in (HEADS, groups, groups, HEADS)
    ]


@pytest.mark.parametrize("length", [1, 63, 64, 129, 200, 384])
@pytest.mark.parametrize("window, groups", [(128, 4), (128, 2), (7, 4), (1, 4)])
def test_windows_equal_plain_attention_with_a_mask(length, window, groups):
    query, key, value, grad = random_inputs(length, groups)
    mixed = windowed_sdpa(query, key, value, window)
    gradients = torch.autograd.grad(mixed, (query, key, value), grad)

    expected = plain_attention(query, key, value, window)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (query, key, value), grad))


def plain_attention(query, key, value, window):
    length, groups = key.size(2), key.size(1)
    position = torch.arange(length, device=key.device)
    distance = position[:, None] - position
    wide_key, wide_value = (x.repeat_interleave(HEADS // groups, 1) for x in (key, value))
    scores = (query @ wide_key.mT / 4).masked_fill((distance < 0) | (distance > window), float("-inf"))
    return scores.softmax(-1) @ wide_value


def attend_from_every_stretch(query, key, value, window, ranks):
    """Each context-parallel rank's two stretches of queries, against all keys; together, the whole sequence."""
    length, mixed = key.size(2), {}
    for rank in range(ranks):
        for start, stop in stretches(length, rank, ranks):
            mixed[start] = attend(query[:, :, start:stop], key, value, window, start)
    return torch.cat([mixed[start] for start in sorted(mixed)], dim=2)


@pytest.mark.parametrize("window", [384, 300, 128, 7])
@pytest.mark.parametrize("ranks, groups", [(2, 4), (2, 1), (3, 2), (4, 2), (4, 4)])
def test_stretches_of_queries_see_their_own_windows(window, ranks, groups):
    query, key, value, grad = random_inputs(384, groups)
    mixed = attend_from_every_stretch(query, key, value, window, ranks)
    gradients = torch.autograd.grad(mixed, (query, key, value), grad)

    expected = plain_attention(query, key, value, window)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (query, key, value), grad))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_merged_blocks_lose_no_precision(dtype, tolerance):
    exact = random_inputs(384, 2)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    results = []
    for query, key, value, grad in (rounded, [x.detach().double().requires_grad_() for x in rounded]):
        mixed = attend_from_every_stretch(query, key, value, 100, 4)
        results.append((mixed, *torch.autograd.grad(mixed, (query, key, value), grad)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("first, stop", [(0, 40), (30, 40), (24, 64), (5, 6)])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 63, 100])
@pytest.mark.parametrize("largest", [5, 1024])
def test_blocks_hold_every_visible_pair_once(first, stop, window, largest):
    pairs = collections.Counter()
    for block in blocks(first, stop, window, largest):
        assert block.kind != "edge" or block.queries[1] - block.queries[0] <= largest
        for query in range(*block.queries):
            for key in range(*block.keys):
                hidden = {"full": False, "diagonal": key > query, "edge": query - key > window}[block.kind]
                pairs[query, key] += not hidden
    visible = {(query, key) for query in range(first, stop) for key in range(max(query - window, 0), query + 1)}
    assert {pair for pair, count in pairs.items() if count} == visible
    assert max(pairs.values()) == 1


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("window", [2048, 600])
def test_a_long_sequence_over_ranks_makes_nothing_of_tokens_times_tokens(window):
    """The last stretch of four ranks, which sees the most keys."""
    length, dim = 2048, 8
    start, stop = stretches(length, 0, 4)[1]
    query, key, value, grad = random_inputs(length, 1, batch=1, dim=dim, dtype=torch.float32)
    with LargestTensor() as largest:
        mixed = attend(query[:, :, start:stop], key, value, window, start)
        mixed.backward(grad[:, :, start:stop])
    assert largest.elements <= max(HEADS * length * dim, (stop - start) ** 2), (
        "a mask of its queries by all keys is more"
    )


GPU_CASES = [
    # what differs from an ungrouped causal layer on a GPU in bf16, and the kernel
    ({}, "sdpa"),
    ({"windowed": True}, "flash"),
    ({"whole": False}, "flash"),
    ({"whole": False, "windowed": True, "grouped": True}, "flash"),
    ({"windowed": True, "wanted": "sdpa"}, "flash"),
    ({"windowed": True, "wanted": "flex"}, "flex"),
    ({"whole": False, "wanted": "flex"}, "flex"),
    ({"windowed": True, "head_dim": 12}, "flex"),
    ({"windowed": True, "head_dim": 512}, "flex"),
    ({"grouped": True}, "sdpa"),
    ({"dtype": torch.float32}, "sdpa"),
    ({"dtype": torch.float32, "grouped": True}, "flex"),
    ({"dtype": torch.float32, "windowed": True}, "flex"),
    ({"dtype": torch.float32, "windowed": True, "wanted": "sdpa"}, "windowed_sdpa"),
    ({"dtype": torch.float32, "whole": False, "grouped": True}, "flex"),
]


@pytest.mark.parametrize("case, kernel", GPU_CASES)
def test_kernels_on_a_gpu(case, kernel):
    plain = {"on_gpu": True, "dtype": torch.bfloat16, "head_dim": 128, "grouped": False, "whole": True}
    assert choose_kernel(**{"wanted": "auto", "windowed": False, **plain, **case}) == kernel


@pytest.mark.parametrize("wanted", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "whole, windowed, kernel", [(True, False, "sdpa"), (True, True, "windowed_sdpa"), (False, True, "blocks")]
)
def test_kernels_on_a_cpu(wanted, dtype, whole, windowed, kernel):
    options = {"dtype": dtype, "head_dim": 64, "grouped": True, "whole": whole, "windowed": windowed}
    assert choose_kernel(wanted, on_gpu=False, **options) == kernel


class Operators(TorchDispatchMode):
    """Records the operators that are called, and arguments of flash attention."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.windows: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        if "flash_attention_forward" in self.names[-1]:
            self.windows.append((args[0].size(1), args[1].size(1), kwargs["window_size_left"], args[8]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("window, first_query", [(100, 0), (300, 768), (1024, 768), (64, 512)])
def test_flash_attention_takes_windows_stretches_and_groups(groups, window, first_query):
    """On tensors of a GPU without memory: the operator is called with only the keys that some query sees."""
    length, batch, dim = 256, 2, 128
    # An engine that another test made in this process has "cuda" mean the CPU, by a function mode that stays.
    with torch._C.DisableTorchFunction(), FakeTensorMode(), torch.no_grad(), Operators() as called:
        query_SBND, key_SBGD = (
            torch.empty(n, batch, heads, dim, device="cuda", dtype=torch.bfloat16)
            for n, heads in ((length, 8), (1024, groups))
        )
        query, key = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD))
        mixed = attend(query, key, key, window, first_query)
        assert mixed.shape == (batch, 8, length, dim)
        assert mixed.permute(2, 0, 1, 3).is_contiguous(), "the output projection would copy"
    seen = min(window, first_query) + length
    assert called.windows == [(length, seen, window, True)]
    assert not {"bmm", "softmax", "clone", "_to_copy"} & set(called.names)


@pytest.mark.parametrize("groups", [4, 1])
def test_flash_attention_is_differentiable_as_it_is_called(groups):
    """On the meta device, where the operator has shapes and its registered derivative."""
    query, key, value = (
        torch.empty(2, heads, n, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads, n in ((HEADS, 64), (groups, 96), (groups, 96))
    )
    flash(query, key, value, 40, 32).sum().backward()
    assert [x.grad.shape for x in (query, key, value)] == [x.shape for x in (query, key, value)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window, first_query", [(192, 128), (20, 64)])
def test_flex_attention_shows_the_same_keys(window, first_query):
    query, key, value, _ = (x.detach() for x in random_inputs(192, 2, dtype=torch.float32))
    stop = first_query + 64
    queries, keys, values = query[:, :, first_query:stop], key[:, :, :stop], value[:, :, :stop]
    with torch._dynamo.config.patch(disable=False), torch.no_grad():  # on a CPU it has no backward pass
        found = flex(queries, keys, values, window, first_query)
        torch.testing.assert_close(found, attend_in_blocks(queries, keys, values, window, first_query))


def test_a_sequence_that_does_not_divide_is_refused():
    """696 of 700 tokens would be covered, and the others silently missing from the loss."""
    with pytest.raises(ValueError, match="sequence of 700 tokens does not divide into the 8 equal chunks of 4 context"):
        stretches(700, 0, 4)
    assert stretches(700, 0, 1) == [(0, 700)]
