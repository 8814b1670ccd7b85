"""Progress on the terminal."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from bov_megatron.evaluation.suite import PREFIX
from bov_megatron.lifecycle.terminal import say
from bov_megatron.training.trainer import Callback


class Progress(Callback):
    """A progress bar on a terminal, else a line every `plain_interval` steps; rank 0 only."""

    def __init__(self, plain_interval: int):
        self.plain_interval, self.bar = plain_interval, None

    def start(self, trainer):
        if dist.get_rank() == 0 and sys.stderr.isatty():
            self.bar = tqdm(
                total=trainer.total_steps,
                initial=trainer.step,
                desc=trainer.recipe.name,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def after_step(self, trainer, record):
        if dist.get_rank() != 0:
            return
        left = (trainer.total_steps - record["step"]) * trainer.throughput.mean_seconds
        rates = f"{record['mean_tokens_per_second']:,.0f} tok/s"
        if "mean_mfu" in record:
            rates += f" · MFU {record['mean_mfu']:.1%}"
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        text = f"loss {loss} · {rates} · {_clock(left)} left"
        self._print_validation(record)
        if "spike_deviations" in record:
            what = "update skipped" if "skipped" in record else "updated anyway (health.on_spike=warn)"
            above = f"{record['spike_deviations']:.0f} deviations above those before"
            say(f"step {record['step']}: loss {record['loss']:.4f} is {above}, {what}")
        elif not record["updated"]:
            say(f"step {record['step']}: loss or gradients are not finite, update skipped")
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif trainer.is_due(self.plain_interval) or record["step"] == 1:
            say(f"step {record['step']}/{trainer.total_steps} · {text}")

    def after_line(self, trainer, line):
        if dist.get_rank() != 0:
            return
        self._print_validation(line)
        if "rollback" in line:
            self._print_roll_back(line["rollback"])
        if self.bar is not None:
            self.bar.n = trainer.step
            self.bar.refresh()

    def _print_validation(self, line: dict[str, Any]) -> None:
        if "validation_bits_per_byte" in line:
            say(f"step {line['step']}: validation {line['validation_bits_per_byte']:.4f} bits per byte")
        if "evaluation_seconds" in line:
            scores = {name: value for name, value in line.items() if name.startswith(PREFIX) and "stderr" not in name}
            listing = ", ".join(f"{name.removeprefix(PREFIX)} {value:.4f}" for name, value in scores.items())
            say(f"step {line['step']}: {listing} ({line['evaluation_seconds']:.0f} s)")
        for sample in line.get("samples", []):
            prompt, text = (json.dumps(sample[part], ensure_ascii=False) for part in ("prompt", "text"))
            say(f"step {line['step']}: {prompt} → {text}")

    def _print_roll_back(self, rollback: dict[str, Any]) -> None:
        loss = "" if rollback["loss"] is None else f" (loss {rollback['loss']:.4f})"
        say(
            f"step {rollback['from_step']}: {rollback['reason']}{loss}; back to step {rollback['to_step']}, without "
            f"batches {rollback['first_batch']} to {rollback['last_batch']} of the data's order "
            "(health.on_spike=rollback)"
        )

    def finish(self, trainer):
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
