"""The value table's lookup over two tensor-parallel ranks, by itself: forward and backward of each variant.

Shapes: B batch, S sequence, V vocabulary, K = kv_dim, T tensor-parallel ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.benchmarks.timing import Spread, Timings, speed_ratio, take_turns
from bov_megatron.benchmarks.training_step import bench_recipe, free_port
from bov_megatron.model.value_bank import ValueTable
from bov_megatron.parallel import cpu, process_groups
from bov_megatron.recipe import Recipe

RANKS = 2
TRANSFERS = {"all_reduce": 3, "reduce_scatter": 2, "all_to_all": 2, "head": 0}
"""How often a variant moves (T-1)/T of the looked-up values: an all-reduce counts twice, a reduce-scatter, an
all-to-all and the backward pass's all-gather once."""
REPEATS = 5
"""Lookups in one timed turn."""


def bytes_per_rank(variant: str, tokens: int, kv_dim: int, element_size: int, ranks: int) -> int:
    """Bytes that each rank sends in one lookup, forward and backward: TRANSFERS · (T-1)/T · tokens · kv_dim ·
    element_size. That is ring collectives' traffic; a communication library may choose other algorithms."""
    return TRANSFERS[variant] * tokens * kv_dim * element_size * (ranks - 1) // ranks


def bench_lookup(turns: int, quick: bool, threads: int) -> dict:
    """Milliseconds per lookup (the slower rank's), speed against `all_reduce`, and bytes sent per rank.

    Uses two GPUs with NCCL where there are as many, else two processes and gloo; then with CPU tensors.
    Raises RuntimeError with the rank's exit code where one fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    gpus = torch.cuda.device_count() >= RANKS
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        arguments = (free_port(), turns, quick, gpus, max(threads // RANKS, 1), folder)
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"the lookup benchmark's ranks ended with exit codes {codes}; their errors are above")
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return _summary(results, bench_recipe("bank", quick, gpu=gpus))


def _summary(results: list[dict], recipe: Recipe) -> dict:
    timings = {
        variant: Timings(
            *(list(map(max, *(result["seconds"][variant][clock] for result in results))) for clock in (0, 1))
        )
        for variant in TRANSFERS
    }
    element_size = 4 if recipe.train.precision == "fp32" else 2
    tokens = recipe.train.micro_batch_size * recipe.model.sequence_length
    variants = {
        variant: {
            "milliseconds": Spread.of([1e3 * seconds / REPEATS for seconds in timings[variant].wall]),
            "speed / all_reduce": speed_ratio(timings, variant, "all_reduce"),
            "bytes_per_rank": bytes_per_rank(variant, tokens, recipe.model.kv_dim, element_size, RANKS),
            **results[0]["norms"][variant],
        }
        for variant in TRANSFERS
    }
    return {"ranks": RANKS, "tokens": tokens, "kv_dim": recipe.model.kv_dim, "variants": variants}


def _rank(rank: int, port: int, turns: int, quick: bool, gpus: bool, threads: int, folder: str) -> None:
    """One tensor-parallel rank: writes `<rank>.json` with seconds per turn and the results' norms."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NCCL refuses two ranks on one GPU: stay off it
    torch.set_num_threads(threads)
    recipe = bench_recipe("bank", quick, gpu=gpus)
    recipe.parallel.tensor_model_parallel_size = RANKS
    process_groups.initialize(recipe, rank, RANKS, local_rank=rank, init_method=f"tcp://127.0.0.1:{port}")
    try:
        tables = {variant: _table(recipe, variant) for variant in TRANSFERS}
        ids_BS = _random((recipe.train.micro_batch_size, recipe.model.sequence_length), 1, recipe.model.vocab_size)
        norms = {variant: _norms(table, ids_BS) for variant, table in tables.items()}

        def lookups(table: ValueTable) -> None:
            for _ in range(REPEATS):
                values = table(ids_BS)
                values.backward(values.detach())

        timings = take_turns({v: lambda turn, table=table: lookups(table) for v, table in tables.items()}, turns)
        seconds = {variant: (timing.wall, timing.processor) for variant, timing in timings.items()}
        (Path(folder) / f"{rank}.json").write_text(json.dumps({"seconds": seconds, "norms": norms}))
    finally:
        process_groups.shutdown()


def _table(recipe: Recipe, variant: str) -> ValueTable:
    """A table whose rows are the same for every variant, with the fp32 `main_grad` that training gives it."""
    model, group = recipe.model, parallel_state.get_tensor_model_parallel_group()
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    partition, lookup = ("head", "reduce_scatter") if variant == "head" else ("vocab", variant)
    table = ValueTable(model.vocab_size, model.kv_heads, model.kv_channels, partition, lookup, dtype, group)
    generator = torch.Generator().manual_seed(0)
    full_VK = torch.randn(model.vocab_size, model.kv_dim, generator=generator)
    with torch.no_grad():
        table.weight.copy_(full_VK.chunk(group.size(), table.partition_dim)[group.rank()])
    table.weight.main_grad = torch.zeros_like(table.weight, dtype=torch.float32)
    return table


def _norms(table: ValueTable, ids_BS: torch.Tensor) -> dict[str, float]:
    """Norms of one lookup's values and of its table gradient, over all ranks: the same for every variant."""
    values = table(ids_BS)
    values.backward(values.detach())
    squares = torch.stack([values.detach().double().square().sum(), table.weight.main_grad.double().square().sum()])
    dist.all_reduce(squares)
    value_norm, gradient_norm = squares.sqrt().tolist()
    return {"value_norm": value_norm, "gradient_norm": gradient_norm}


def _random(shape: tuple[int, ...], seed: int, high: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(cpu.device())
