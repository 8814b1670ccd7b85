"""Running benchmarks by name and formatting their results."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.timing import Spread
from bov_megatron.parallel.device import device_name, has_gpu

NAMES = {
    "step": "a whole training step: bank against projection, with Muon and with AdamW",
    "attention": "a whole training step: our core attention against Megatron's own local one",
    "loss": "output layer and loss: ours against Megatron's cross-entropy, time and peak memory",
    "loader": "the data loader by itself, and its share of a training step",
    "lookup": "the value table's lookup over tensor-parallel ranks: its time, a step's, and bytes on natural text",
    "checkpoint": "how long a save stalls training: waiting for it, and written beside training",
    "core": "CORE's examples per second, against one example per forward pass",
    "generate": "generation by exported models: bank against projection, tokens/s and memory, with a picture",
    "plot": "drawing twenty runs of 100,000 steps",
    "studies": "how long status and results of a study of 2,000 cells take",
    "coverage": "how often the intervals of `study fit` hold the truth (an hour; only by name, or with --quick)",
    "recipes": "tokens/s, MFU and peak memory of the published recipes (GPU, or with --quick)",
    "profile": "the kernels of a 780M step that take longest (GPU, or with --quick)",
}
TURNS, QUICK_TURNS = 9, 1
PICTURE = Path("bench/generate.png")
EVIDENCE = ("losses", "gradient_norms", "value_norm", "gradient_norm", "bytes", "continuations", "bytes_by_context")
"""In the JSON only; most show that variants agree or differ as they should."""
TRAINING_STEPS = ("step", "attention", "recipes")
"""Benchmarks of one module."""
GPU_ONLY = ("recipes", "profile")


def run(
    names: Sequence[str] = (),
    quick: bool = False,
    turns: int | None = None,
    threads: int | None = None,
    against: str | None = None,
    settings: Sequence[str] = (),
    picture: Path = PICTURE,
    seed: int = 0,
) -> dict:
    """Run the benchmarks `names` (default: all that this machine can run); returns plain JSON values.

    Args:
        quick: tiny models and a single turn, to see that everything runs; its times mean nothing.
        turns: how often to time each variant.
        threads: torch's, on a CPU; default: OMP_NUM_THREADS, else one per core.
        against: a commit; `step`, alone, then compares this tree with it.
        settings: for `step` alone, recipe fields `section.field=value`; of this tree.
        picture: what `generate` draws.
        seed: of the studies that `coverage` draws.

    Raises ValueError for an unknown name or commit, for `against` or `settings` with another benchmark than `step`, or
    for one that needs a GPU where there is none.
    """
    gpu = has_gpu()
    left_out = {*(() if gpu or quick else GPU_ONLY), *(() if quick else ("coverage",))}
    names = list(dict.fromkeys(names)) or [name for name in NAMES if name not in left_out]
    for name in names:
        if name not in NAMES:
            raise ValueError(f"unknown benchmark '{name}'; known: {', '.join(NAMES)}")
        if name in left_out and name in GPU_ONLY:
            raise ValueError(f"the benchmark '{name}' needs a GPU and torch finds none; leave it out, or try --quick")
    if against and names != ["step"]:
        raise ValueError(f"--against {against} compares the benchmark 'step'; name it, and no other")
    if settings and names != ["step"]:
        raise ValueError(f"--set {settings[0]} is for the benchmark 'step'; name it, and no other")
    if turns is not None and turns < 1:
        raise ValueError(f"--turns {turns}: must be at least 1")
    turns = turns or (QUICK_TURNS if quick else TURNS)
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count())
    results = {"machine": machine(), "quick": quick, "turns": turns}
    if against:
        from benchmarks.against import bench_against
    for name in names:
        print(f"{name}: {NAMES[name]} …", file=sys.stderr, flush=True)
        if against:
            results[name] = _plain(bench_against(against, turns, quick, settings))
        else:
            results[name] = _plain(_run_one(name, turns, quick, results, settings, picture, seed))
    return results


def _run_one(
    name: str, turns: int, quick: bool, results: dict, settings: Sequence[str], picture: Path, seed: int
) -> dict:
    # Its own module alone, and only now: a wrong name shouldn't wait for Megatron's import, nor one benchmark need the
    # packages of another.
    module = import_module(f"benchmarks.{'training_step' if name in TRAINING_STEPS else name}")
    benchmark = getattr(module, f"bench_{name}")
    if name == "coverage":
        return benchmark(quick, seed)
    more = {
        "step": (settings,),
        "lookup": (torch.get_num_threads(),),
        "generate": (picture,),
        "loader": (_step_seconds(results, quick),),
    }
    return benchmark(turns, quick, *more.get(name, ()))


def _step_seconds(results: dict, quick: bool) -> float | None:
    """Seconds of a step with the bank, if that was measured too."""
    if "step" not in results:
        return None
    from benchmarks.training_step import bench_recipe

    rate = results["step"]["muon"]["variants"]["bank"]["tokens_per_second"]["median"]
    return bench_recipe("bank", quick).batch_tokens / rate


def machine() -> dict:
    return {
        "device": device_name(),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
    }


def format_results(results: dict) -> str:
    """Results as text: medians, with ranges in brackets and intervals behind them."""
    m = results["machine"]
    head = (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads, load {m['load_average']:.1f}; torch {m['torch']}"
    )
    lines = [head, f"medians of {results['turns']} turns [min – max]"]
    if results["turns"] >= 6:
        lines[-1] += " (95% confidence interval of the median)"
    if results["quick"]:
        lines.append("QUICK: tiny models, these times mean nothing")
    for name in NAMES:
        if name in results:
            lines += ["", f"{name}: {NAMES[name]}", *_lines(results[name], 1)]
    return "\n".join(lines)


def _lines(values: dict, depth: int) -> list[str]:
    lines = []
    for key, value in values.items():
        label = "  " * depth + key.replace("_", " ") if key != "wall" else "  " * depth + "wall clock"
        if key == "variants":
            lines += _lines(value, depth)
        elif key in EVIDENCE or value is None:
            continue
        elif key == "kernels":
            lines += [
                "  " * depth
                + f"{row['milliseconds']:10.2f} ms {row['share']:6.1%} {row['calls']:8,} × {row['name'][:80]}"
                for row in value
            ]
        elif key == "share_of_step":
            lines.append(f"{label:<34}{value:.3%}")
        elif isinstance(value, dict) and "median" in value:
            shown = {name: _number(number) for name, number in value.items() if number is not None}
            line = f"{label:<34}{shown['median']} [{shown['minimum']} – {shown['maximum']}]"
            lines.append(f"{line} ({shown['low']} – {shown['high']})" if "low" in shown else line)
        elif isinstance(value, dict):
            lines += [label, *_lines(value, depth + 1)]
        else:
            lines.append(f"{label:<34}{_number(value)}")
    return lines


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if abs(value) >= 100 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _plain(value):
    """`value` with nested Spreads as dictionaries."""
    if isinstance(value, Spread):
        return dataclasses.asdict(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
