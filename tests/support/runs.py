"""Whole training runs in forked ranks, through the command line's own entry point."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from tests.support.distributed import run_ranks

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")
TIMINGS = (
    *("step_seconds", "tokens_per_second", "mean_tokens_per_second", "mfu", "mean_mfu"),
    *("validation_seconds", "samples_seconds", "evaluation_seconds", "data_seconds", "data_rank"),
    *("slowest_rank", "slowest_rank_seconds", "fastest_rank_seconds"),
)

TINY = [
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.steps=8",
    "optimizer.warmup_steps=2",
    "validation.tokens=2048",
    "validation.interval=4",
    "checkpoint.interval=3",
    "logging.wandb=disabled",
    "logging.table_interval=2",
    "data.shuffle_block_size=128",
    "parallel.tensor_model_parallel_size=1",
]
"""Over recipes/smoke.yaml: three layers, the last one with a bank, a second or two for eight steps."""


def overrides(data, run_dir: Path, *changes: str) -> list[str]:
    """Command-line overrides of a tiny run; `changes` replace those of TINY that name the same field."""
    values = dict(item.split("=", 1) for item in (*TINY, *data.overrides(), f"output_dir={run_dir}", *changes))
    return [f"{key}={value}" for key, value in values.items()]


def train(world_size: int, arguments: list[str], timeout: float = 600) -> str:
    """Run `bov_megatron.train` on the smoke recipe; returns the ranks' stderr. Fails unless all end well."""
    results = launch(world_size, arguments, timeout=timeout)
    assert [code for code, _ in results] == [0] * world_size, "".join(text for _, text in results)
    return "".join(text for _, text in results)


def launch(world_size: int, arguments: list[str], recipe: str = SMOKE, timeout: float = 600) -> list[tuple[int, str]]:
    """(exit status, stderr) of each rank."""
    return run_ranks(_rank, world_size, [recipe, *arguments], timeout=timeout)


def _rank(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str]:
    from bov_megatron import train

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code = train.main(arguments)
        except SystemExit as end:  # argparse's own refusals
            code = end.code
    return code, stderr.getvalue()


def metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics without what differs from run to run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def steps(run_dir: Path) -> list[dict]:
    """The same, where a validation that was cut short and made up for is in its step's line, as if it had not been."""
    found: dict[int, dict] = {}
    for line in metrics(run_dir):
        known = found.setdefault(line["step"], {})
        assert known.keys() & line.keys() <= {"step", "tokens"}, f"step {line['step']} is logged twice"
        known.update(line)
    return list(found.values())
