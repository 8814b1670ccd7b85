"""Bytes that a rank sends for one table's lookup of a micro-batch of natural text. T: tensor-parallel ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings

from benchmarks.ranks import on_ranks
from benchmarks.text import text_ids
from bov_megatron.model.bank.lookup_ahead import look_up
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.recipe import ModelConfig, ParallelConfig, Recipe, TrainConfig, ValueConfig

LOOKUPS = ("reduce_scatter", "distinct")
RANKS = (2, 4)
CALCULATED_RANKS = 8
ELEMENT_SIZE = 2
"""Bytes, of bf16."""
SAMPLE_LENGTH = 2048
SIZES = {"vocab_size": 32768, "tokens": (2048, 4096, 8192, 16384, 32768, 65536), "max_bytes": 30_000_000}
QUICK_SIZES = {"vocab_size": 512, "tokens": (2048, 4096), "max_bytes": 1_000_000}


def bench_traffic(quick: bool, threads: int) -> dict:
    """Counted bytes per rank, table and micro-batch, by number of ranks and tokens; forward, backward, in bf16.

    Ranks own unequal shares of the distinct ids, so both the mean over ranks and the highest total are given.
    """
    sizes = QUICK_SIZES if quick else SIZES
    samples = text_ids(sizes["vocab_size"], max(sizes["tokens"]) // SAMPLE_LENGTH, SAMPLE_LENGTH, sizes["max_bytes"])
    result = {}
    for ranks in RANKS:
        recipe = _recipe(sizes["vocab_size"], ranks)
        counted = on_ranks(count_on_rank, recipe, threads, samples, sizes["tokens"])
        result[f"{ranks}_ranks"] = {
            f"{tokens}_tokens": _summary(samples, tokens, recipe, [rank[str(tokens)] for rank in counted])
            for tokens in sizes["tokens"]
        }
    recipe = _recipe(sizes["vocab_size"], CALCULATED_RANKS)
    result[f"{CALCULATED_RANKS}_ranks_calculated"] = {
        f"{tokens}_tokens": _summary(samples, tokens, recipe, calculated(samples, tokens, recipe))
        for tokens in sizes["tokens"]
    }
    return result


def calculated(samples: torch.Tensor, tokens: int, recipe: Recipe) -> list[dict[str, list[int]]]:
    """By rank and lookup: bytes sent forward and backward, computed from the ids.

    A ring's reduce-scatter or all-gather sends (T-1)/T of what the ranks hold together. `distinct` sends T-1 ranks
    their columns of a rank's own rows, and backward the gradients of the others' rows.
    """
    ranks, kv_dim = recipe.parallel.tensor_model_parallel_size, recipe.model.kv_dim
    once = tokens * kv_dim * ELEMENT_SIZE * (ranks - 1) // ranks
    owners = samples.flatten()[:tokens].unique() // (recipe.padded_vocab_size() // ranks)
    own = torch.bincount(owners, minlength=ranks).tolist()
    row = kv_dim // ranks * ELEMENT_SIZE
    return [
        {
            "reduce_scatter": [once, once],
            "distinct": [(ranks - 1) * own[rank] * row, (sum(own) - own[rank]) * row],
        }
        for rank in range(ranks)
    ]


def _summary(samples: torch.Tensor, tokens: int, recipe: Recipe, by_rank: list[dict[str, list[int]]]) -> dict:
    share = samples.flatten()[:tokens].unique().numel() / tokens
    sizes, mean = {}, {}
    for lookup in LOOKUPS:
        both = [sum(rank[lookup]) for rank in by_rank]
        forward, backward = (sum(rank[lookup][way] for rank in by_rank) / len(by_rank) for way in (0, 1))
        sizes[lookup] = {"forward": round(forward), "backward": round(backward), "highest_rank": max(both)}
        mean[lookup] = forward + backward
    return {
        "distinct_share": share,
        "distinct / reduce_scatter": mean["distinct"] / mean["reduce_scatter"],
        "highest rank's share": max(sum(rank["distinct"]) for rank in by_rank) / mean["reduce_scatter"],
        "kv_dim": recipe.model.kv_dim,
        "bytes": sizes,
    }


def _recipe(vocab_size: int, ranks: int) -> Recipe:
    """As little as a table needs. Bytes are proportional to kv_dim, here 512."""
    model = ModelConfig(
        num_layers=3, hidden_size=512, num_attention_heads=8, vocab_size=vocab_size, value=ValueConfig(source="bank")
    )
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, steps=1)
    return Recipe(model=model, parallel=ParallelConfig(tensor_model_parallel_size=ranks), train=train)


def count_on_rank(recipe: Recipe, samples: torch.Tensor, sizes: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """By number of tokens and lookup: bytes that this rank sends through torch.distributed, forward and backward."""
    counted: dict[str, dict[str, list[int]]] = {}
    for lookup in LOOKUPS:
        table = new_table(recipe, lookup)
        for tokens in sizes:
            ids_BS = samples.flatten()[:tokens].view(-1, SAMPLE_LENGTH)
            with counting() as sent:
                values = look_up(ids_BS, table)
                forward = sum(sent)
                values.backward(torch.ones_like(values))
            counted.setdefault(str(tokens), {})[lookup] = [forward, sum(sent) - forward]
    return counted


def new_table(recipe: Recipe, lookup: str) -> ValueTable:
    model = dataclasses.replace(recipe.model, value=ValueConfig(source="bank", lookup=lookup))
    group = parallel_state.get_tensor_model_parallel_group()
    table = ValueTable(model, recipe.padded_vocab_size(), torch.bfloat16, group)
    torch.nn.init.zeros_(table.weight)
    table.weight.main_grad = torch.zeros_like(table.weight, dtype=torch.float32)
    return table


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Collects the bytes that this rank sends through torch.distributed in each call inside the block; reductions and
    gathers count as rings. Collectives that aren't counted fail."""
    sent: list[int] = []
    names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    with contextlib.ExitStack() as stack:
        for name in names:
            wrapped = _counted(name, getattr(dist, name), sent)
            stack.enter_context(mock.patch.object(dist, name, wrapped))
        stack.enter_context(mock.patch.object(mappings, "dist_all_gather_func", dist.all_gather_into_tensor))
        stack.enter_context(mock.patch.object(mappings, "dist_reduce_scatter_func", dist.reduce_scatter_tensor))
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "isend"):
            stack.enter_context(mock.patch.object(dist, name, side_effect=AssertionError(f"{name} is not counted")))
        yield sent


def _counted(name: str, collective, sent: list[int]):
    def call(*arguments, group=None, **options):
        size = group.size()
        handed = arguments[1]
        if name == "all_to_all_single" and len(arguments) > 3:
            own = arguments[3][group.rank()] * handed.stride(0)
            sent.append((handed.numel() - own) * handed.element_size())
        else:
            times = size - 1 if name == "all_gather_into_tensor" else (size - 1) / size
            sent.append(round(handed.nbytes * times))
        return collective(*arguments, group=group, **options)

    return call
