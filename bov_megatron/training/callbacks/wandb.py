"""Metrics in Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bov_megatron.lifecycle.run_folder import WANDB_ID
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.training.trainer import Callback


class Wandb(Callback):
    """Logs every step to Weights & Biases; rank 0 only. Where a rollback repeats a step, wandb keeps the first line."""

    def __init__(self, run_dir: Path, mode: Literal["offline", "online", "disabled"], project: str):
        self.run_dir, self.mode, self.project = run_dir, mode, project
        self.run: Any = None

    def start(self, trainer):
        if dist.get_rank() != 0 or self.mode == "disabled":
            return
        import wandb

        try:
            self.run = wandb.init(
                project=self.project,
                name=trainer.recipe.name,
                id=_run_id(self.run_dir),
                resume="allow",
                dir=self.run_dir,
                mode=self.mode,
                config=trainer.recipe.to_dict(),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.Error as error:  # e.g. no network; metrics.jsonl has the same numbers
            warn(f"continuing without wandb: {error}")

    def after_step(self, trainer, record):
        if self.run is not None:
            # Without `step`, a resumed offline run would count from 0 again.
            numbers: dict[str, Any] = {key: value for key, value in record.items() if isinstance(value, int | float)}
            if "samples" in record:
                import wandb

                rows = [[sample["prompt"], sample["text"]] for sample in record["samples"]]
                numbers["samples"] = wandb.Table(columns=["prompt", "text"], data=rows)
            self.run.log(numbers, step=record["step"])

    def after_line(self, trainer, line):
        if "rollback" not in line:  # its step is one that wandb has already
            self.after_step(trainer, line)

    def finish(self, trainer):
        if self.run is not None:
            self.run.finish()


def _run_id(run_dir: Path) -> str:
    """The wandb run id of a run folder, the same for every start."""
    path = run_dir / WANDB_ID
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text()
