"""The value table's lookup over two tensor-parallel ranks: alone, and in a training step, which can hide its traffic.

Shapes: B batch, S sequence, V vocabulary, K = kv_dim, T tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.ranks import on_ranks
from benchmarks.text import text_ids
from benchmarks.timing import Spread, Timings, speed_ratio, take_turns
from benchmarks.traffic import bench_traffic, counting
from benchmarks.training_step import bench_recipe
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.model.bank.lookup_ahead import look_up
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.recipe import Recipe, ValueConfig

RANKS = 2
VARIANTS = ("reduce_scatter", "distinct", "head")
STEP_VARIANTS = ("reduce_scatter", "distinct")
REPEATS = 5
"""Lookups per turn."""
TEXT_BYTES = 4_000_000


def bench_lookup(turns: int, quick: bool, threads: int) -> dict:
    """Of one lookup, forward and backward: milliseconds (the slower rank's), speed against `reduce_scatter`, counted
    bytes that a rank sends. Of a training step with a table in every layer: tokens/s and their ratio. Of larger
    micro-batches and more ranks: bytes. All on natural text.

    Uses two GPUs with NCCL where there are as many, else two processes and gloo.
    """
    gpus = torch.cuda.device_count() >= RANKS
    recipe = bench_recipe("bank", quick, gpu=gpus)
    recipe.model.value.target_layers = "every"
    recipe.parallel.tensor_model_parallel_size = RANKS
    length, batch = recipe.model.sequence_length + 1, recipe.train.global_batch_size
    samples = text_ids(recipe.model.vocab_size, batch, length, TEXT_BYTES)
    results = on_ranks(measure_on_rank, recipe, threads, samples, turns)
    traffic = bench_traffic(quick, threads)
    return {
        "ranks": RANKS,
        "tokens": recipe.train.micro_batch_size * recipe.model.sequence_length,
        "kv_dim": recipe.model.kv_dim,
        "variants": _lookups([result["lookup"] for result in results]),
        "training_step": _steps([result["step"] for result in results], recipe),
        "traffic": traffic,
    }


def _lookups(results: list[dict]) -> dict[str, dict]:
    timings = _slower(results, VARIANTS)
    return {
        variant: {
            "milliseconds": Spread.of([1e3 * seconds / REPEATS for seconds in timings[variant].wall]),
            "speed / reduce_scatter": speed_ratio(timings, variant, "reduce_scatter"),
            "bytes_per_rank": round(sum(result["evidence"][variant]["bytes"] for result in results) / len(results)),
            "value_norm": results[0]["evidence"][variant]["value_norm"],
            "gradient_norm": results[0]["evidence"][variant]["gradient_norm"],
        }
        for variant in VARIANTS
    }


def _steps(results: list[dict], recipe: Recipe) -> dict:
    timings = _slower(results, STEP_VARIANTS)
    variants = {
        variant: {
            "tokens_per_second": Spread.of([recipe.batch_tokens / seconds for seconds in timings[variant].wall]),
            "losses": results[0]["evidence"][variant],
        }
        for variant in STEP_VARIANTS
    }
    return {"variants": variants, "distinct / reduce_scatter": speed_ratio(timings, "distinct", "reduce_scatter")}


def _slower(results: list[dict], variants: tuple[str, ...]) -> dict[str, Timings]:
    """The slower rank's seconds in each turn."""
    return {
        variant: Timings(
            *(list(map(max, *(result["seconds"][variant][clock] for result in results))) for clock in (0, 1))
        )
        for variant in variants
    }


def measure_on_rank(recipe: Recipe, samples: torch.Tensor, turns: int) -> dict:
    """This rank's seconds per turn of lookups and training steps, and evidence that variants agree."""
    return {"lookup": _measure_lookups(recipe, samples, turns), "step": _measure_steps(recipe, samples, turns)}


def _measure_lookups(recipe: Recipe, samples: torch.Tensor, turns: int) -> dict:
    ids_BS = samples[: recipe.train.micro_batch_size, :-1].contiguous()
    tables = {variant: _table(recipe, variant) for variant in VARIANTS}
    evidence = {variant: _evidence(table, ids_BS) for variant, table in tables.items()}

    def lookups(table: ValueTable) -> None:
        for _ in range(REPEATS):
            values = look_up(ids_BS.to(table.weight.device) if not table.ahead else ids_BS, table)
            values.backward(values.detach())

    timings = take_turns({v: lambda turn, table=table: lookups(table) for v, table in tables.items()}, turns)
    return {"seconds": _seconds(timings), "evidence": evidence}


def _measure_steps(recipe: Recipe, samples: torch.Tensor, turns: int) -> dict:
    engines = {}
    for variant in STEP_VARIANTS:
        value = dataclasses.replace(recipe.model.value, lookup=variant)
        engines[variant] = MegatronEngine(
            dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, value=value))
        )
    losses: dict[str, list[float]] = {variant: [] for variant in STEP_VARIANTS}
    micro_batches = list(samples.split(recipe.train.micro_batch_size))

    def step(variant: str) -> None:
        losses[variant].append(engines[variant].train_step(micro_batches).loss)

    timings = take_turns({v: lambda turn, v=v: step(v) for v in STEP_VARIANTS}, turns, discard=2)
    return {"seconds": _seconds(timings), "evidence": losses}


def _seconds(timings: dict[str, Timings]) -> dict[str, tuple[list[float], list[float]]]:
    return {variant: (timing.wall, timing.processor) for variant, timing in timings.items()}


def _table(recipe: Recipe, variant: str) -> ValueTable:
    """A table with the same rows for every variant, and the fp32 `main_grad` it has in training."""
    model, group = recipe.model, parallel_state.get_tensor_model_parallel_group()
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    partition, lookup = ("head", "reduce_scatter") if variant == "head" else ("vocab", variant)
    value = ValueConfig(source="bank", table_partition=partition, lookup=lookup)
    table = ValueTable(dataclasses.replace(model, value=value), model.vocab_size, dtype, group)
    generator = torch.Generator().manual_seed(0)
    full_VK = torch.randn(model.vocab_size, model.kv_dim, generator=generator)
    with torch.no_grad():
        table.weight.copy_(full_VK.chunk(group.size(), table.partition_dim)[group.rank()])
    table.weight.main_grad = torch.zeros_like(table.weight, dtype=torch.float32)
    return table


def _evidence(table: ValueTable, ids_BS: torch.Tensor) -> dict[str, float]:
    """Bytes that this rank sends in one lookup, and the norms of values and table gradient over all ranks, which should
    be the same for every variant."""
    with counting() as sent:
        values = look_up(ids_BS.to(table.weight.device), table)
        values.backward(values.detach())
    squares = torch.stack([values.detach().double().square().sum(), table.weight.main_grad.double().square().sum()])
    dist.all_reduce(squares)
    value_norm, gradient_norm = squares.sqrt().tolist()
    return {"bytes": sum(sent), "value_norm": value_norm, "gradient_norm": gradient_norm}
