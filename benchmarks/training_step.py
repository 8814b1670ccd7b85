"""Whole training steps (forward, backward, optimizer) of recipes that differ in one field."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks.megatron_attention import MegatronCoreAttention
from benchmarks.timing import Spread, speed_ratio, take_turns
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.model import spec
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.device import has_gpu
from bov_megatron.recipe import Recipe, check_recipe, load_recipe, recipe_from_dict
from bov_megatron.recipe.loading import apply_overrides
from bov_megatron.recipe.quantities import flops_per_token
from bov_megatron.training.throughput import peak_flops

SOURCES = ("bank", "projection")
OPTIMIZERS = ("muon", "adamw")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PUBLISHED = ("135m_baseline", "135m_bov", "780m_baseline", "780m_bov")
CPU_MODEL = {"num_layers": 12, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 8192, "sequence_length": 512}
QUICK_MODEL = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 512, "sequence_length": 256}


def bench_recipe(
    source: str,
    quick: bool = False,
    optimizer: str = "muon",
    gpu: bool | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """The recipe to time: on a CPU 12 layers of width 256 in fp32, four sequences of 512 tokens per step; on a GPU the
    135M model in bf16, sixteen sequences of 2048 tokens in two micro-batches.

    Args:
        settings: further fields, `section.field=value`.
    """
    gpu = has_gpu() if gpu is None else gpu
    model, micro, sequences = ({}, 8, 16) if gpu else (CPU_MODEL, 4, 4)
    if quick:
        model, micro, sequences = QUICK_MODEL, 2, 2
    values = {
        "name": source,
        "model": {**model, "value": {"source": source}},
        "train": {
            "micro_batch_size": micro,
            "global_batch_size": sequences,
            "steps": 1000,
            "precision": "bf16" if gpu else "fp32",
        },
        # No warmup, so that even a few steps show in loss and gradients.
        "optimizer": {"name": optimizer, "warmup_steps": 0, "reference_batch_tokens": None},
        "data": {"path": "unused"},
    }
    apply_overrides(values, settings)
    return recipe_from_dict(values)


def bench_step(turns: int, quick: bool, settings: Sequence[str] = ()) -> dict:
    """`bank` against `projection`, with each optimizer."""
    result = {}
    for optimizer in OPTIMIZERS:
        recipes = {source: bench_recipe(source, quick, optimizer, settings=settings) for source in SOURCES}
        variants, seconds = measure(recipes, turns)
        result[optimizer] = {"variants": variants, "bank / projection": speed_ratio(seconds, "bank", "projection")}
    return result


def bench_attention(turns: int, quick: bool) -> dict:
    """Our core attention against Megatron's own local one, for each value source."""
    result = {}
    for source in SOURCES:
        recipes = {core: bench_recipe(source, quick) for core in ("auto", "megatron")}
        variants, seconds = measure(recipes, turns, build=_engine_with_attention)
        result[source] = {"variants": variants, "auto / megatron": speed_ratio(seconds, "auto", "megatron")}
    return result


def _engine_with_attention(core: str, recipe: Recipe) -> MegatronEngine:
    if core == "auto":
        return MegatronEngine(recipe)
    with mock.patch.object(spec, "SdpaCoreAttention", MegatronCoreAttention):
        return MegatronEngine(recipe)


def published(name: str, quick: bool = False) -> Recipe:
    """A published recipe on one rank, with its whole batch, so that the optimizer weighs what it weighs in a run: over
    more ranks both are divided."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["train.steps=1000", "data.path=unused", "train.compile=null"])
    recipe.parallel.tensor_model_parallel_size = recipe.parallel.pipeline_model_parallel_size = 1
    recipe.parallel.sequence_parallel = False
    if quick:
        recipe.model = replace(recipe.model, **QUICK_MODEL)
        recipe.train.micro_batch_size, recipe.train.global_batch_size = 2, 4
    check_recipe(recipe)
    return recipe


def bench_recipes(turns: int, quick: bool) -> dict:
    """Tokens/s, MFU and peak memory of the published recipes on one GPU, or the error of one that needs more."""
    result = {}
    for name in PUBLISHED:
        recipe = published(name, quick)
        gc.collect()
        reset_peak_memory()
        try:
            variants, _ = measure({name: recipe}, turns)
        except torch.cuda.OutOfMemoryError as error:
            result[name] = {"error": str(error).splitlines()[0]}
            continue
        rate, peak = variants[name]["tokens_per_second"], peak_flops(recipe)
        mfu = rate.median * flops_per_token(recipe.model) / peak if peak else None
        result[name] = {**variants[name], "mfu": mfu, "peak_memory_bytes": peak_memory()}
    return result


def reset_peak_memory() -> None:
    if has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes of this rank's tensors on the GPU at the worst moment since `reset_peak_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if has_gpu() else None


def measure(
    recipes: Mapping[str, Recipe],
    turns: int,
    build: Callable[[str, Recipe], MegatronEngine] = lambda name, recipe: MegatronEngine(recipe),
) -> tuple[dict[str, dict], dict]:
    """Train the recipes in this process, a step each in turn, on the same random batches (one rank).

    Token ids are uniform, which touches more table rows than any text. Returns per recipe `tokens_per_second` and each
    step's `losses` (nats per token) and `gradient_norms`, to show that variants differ or agree; and the timings for
    `timing.speed_ratio`.
    """
    steps_done: dict[str, list] = {name: [] for name in recipes}
    with one_process(next(iter(recipes.values()))):
        engines = {name: build(name, recipe) for name, recipe in recipes.items()}

        def step(name: str, turn: int) -> None:
            steps_done[name].append(engines[name].train_step(random_micro_batches(recipes[name], turn)))

        steps = {name: lambda turn, name=name: step(name, turn) for name in recipes}
        timings = take_turns(steps, turns, discard=2)
    variants = {
        name: {
            "tokens_per_second": Spread.of([recipe.batch_tokens / s for s in timings[name].wall]),
            "losses": [step.loss for step in steps_done[name]],
            "gradient_norms": [step.gradient_norm for step in steps_done[name]],
        }
        for name, recipe in recipes.items()
    }
    return variants, timings


def random_micro_batches(recipe: Recipe, seed: int) -> list[torch.Tensor]:
    """A step's micro-batches, each int64 `[micro_batch_size, T + 1]`, for data-parallel size 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (recipe.train.global_batch_size, recipe.model.sequence_length + 1)
    return list(torch.randint(recipe.model.vocab_size, shape, generator=generator).split(recipe.train.micro_batch_size))


@contextlib.contextmanager
def one_process(recipe: Recipe) -> Iterator[None]:
    """Context manager: process groups of a single rank."""
    process_groups.initialize(recipe, 0, 1, init_method=f"tcp://127.0.0.1:{free_port()}")
    try:
        yield
    finally:
        process_groups.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
