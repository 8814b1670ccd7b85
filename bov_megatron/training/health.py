"""Loss spikes and numbers that are not finite: steps to skip or warn about, runs to roll back or end."""

from __future__ import annotations

import enum
import math
from typing import Any

from bov_megatron.data.loader import TrainBatch
from bov_megatron.data.order import SkippedBatches
from bov_megatron.errors import TrainingError
from bov_megatron.recipe import HealthConfig
from bov_megatron.training.spikes import SpikeDetector


class Verdict(enum.Enum):
    """On a step, before its update: take it, or skip it and why."""

    TAKE = enum.auto()
    SPIKE = enum.auto()
    NOT_FINITE = enum.auto()


class Health:
    """Judges each step before its update, and ends a run that skips too many steps.

    A step is skipped if its loss or gradients are not finite, or, depending on `health.on_spike`, if its loss is a
    spike. A skipped step changes neither weights nor optimizer state. Its line of metrics has `skipped`. The lines of
    skipped steps and of spikes have `sample_ids`, pairs (stream, sample) of the global batch.

    Args:
        config: the recipe's section.
        state: `state()` from the checkpoint that the run resumes from.
    """

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None):
        self.config = config
        self.rollbacks: list[dict[str, Any]] = list((state or {}).get("rollbacks", []))
        """Of the whole run: `number` (from 1), `reason`, `from_step`, `to_step`, `first_batch`, `last_batch`."""
        self._restore(state or {})
        self.verdict = Verdict.TAKE
        """On the current step; the same on every rank, because all ranks judge the same numbers."""
        self._deviations = 0.0

    def _restore(self, state: dict[str, Any]) -> None:
        self.detector = SpikeDetector(self.config.spike_window, state.get("losses"))
        self.skipped: list[int] = list(state.get("skipped", []))
        """Skipped steps among the last `max_skips_within`."""
        self.not_finite: int = state.get("not_finite", 0)
        """Number of steps in a row, up to the last one, that were not finite."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, so that a resumed run judges steps and leaves out samples as this one would."""
        return {
            "losses": self.detector.losses(),
            "skipped": list(self.skipped),
            "not_finite": self.not_finite,
            "rollbacks": [dict(rollback) for rollback in self.rollbacks],
        }

    def skipped_windows(self) -> list[tuple[int, int]]:
        """Batches that rollbacks have left out: 0-based places (first, last) in the data's order."""
        return [(rollback["first_batch"], rollback["last_batch"]) for rollback in self.rollbacks]

    def judge(self, loss: float, gradient_norm: float = 0.0) -> Verdict:
        """The verdict on a step, by numbers that are the same on all ranks; `gradient_norm` where it is known."""
        self._deviations = self.detector.deviations(loss)  # 0 for a loss that is not finite
        if self._is_spike() and self.config.on_spike != "warn":
            self.verdict = Verdict.SPIKE  # with gradients that are not finite, too: it is rolled back
        elif not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.verdict = Verdict.NOT_FINITE
        else:
            self.verdict = Verdict.TAKE
        return self.verdict

    def must_roll_back(self, record: dict[str, Any]) -> bool:
        """Whether the step just made calls for a rollback; the same on every rank."""
        if self.config.on_spike != "rollback" or record["updated"]:
            return False
        return self.verdict is Verdict.SPIKE or self.not_finite + 1 >= self.config.max_not_finite_steps

    def check_may_roll_back(self, record: dict[str, Any]) -> None:
        """Raise TrainingError where the run has rolled back `max_rollbacks` times already."""
        limit = self.config.max_rollbacks
        if len(self.rollbacks) < limit:
            return
        before = ", ".join(f"{rollback['from_step']} to {rollback['to_step']}" for rollback in self.rollbacks) or "none"
        raise TrainingError(
            f"{self.complaint(record)}, and the run has rolled back health.max_rollbacks={limit} times before (from "
            f"step, to step: {before}). Look at the rollback lines of metrics.jsonl and at the learning rates; to go "
            "on from the newest checkpoint regardless, raise health.max_rollbacks or health.spike_deviations, or set "
            "health.on_spike=skip"
        )

    def complaint(self, record: dict[str, Any]) -> str:
        """What is wrong with a step to be rolled back: the beginning of an error message."""
        if self.verdict is Verdict.SPIKE:
            return f"the loss of step {record['step']} is a spike, {self._deviations:.0f} deviations above those before"
        return f"gradients were not finite at {self.not_finite + 1} steps in a row, up to step {record['step']}"

    def roll_back(
        self, record: dict[str, Any], batch: TrainBatch, to_step: int, state: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Go back to the state after `to_step`, and leave out the samples since; returns the line for metrics.

        Args:
            record, batch: of the step that went wrong.
            to_step, state: of the checkpoint that was loaded.
        """
        rollback = {
            "number": len(self.rollbacks) + 1,
            "reason": "spike" if self.verdict is Verdict.SPIKE else "not finite",
            "from_step": record["step"],
            "to_step": to_step,
            "first_batch": SkippedBatches(self.skipped_windows()).place(to_step),
            "last_batch": batch.place,
        }
        self.rollbacks.append(rollback)
        self._restore(state or {})
        cause = {key: record[key] for key in ("loss", "gradient_norm", "digest")}
        cause |= {"spike_deviations": self._deviations, "sample_ids": batch.ids_B2.tolist()}
        return {"step": to_step, "rollback": {**rollback, **cause}}

    def note(self, record: dict[str, Any], batch: TrainBatch) -> None:
        """Count a step that is not rolled back, and add to its line of metrics what was wrong with it.

        Raises TrainingError where too many steps were skipped.
        """
        spike = self._is_spike() or self.verdict is Verdict.SPIKE
        if spike:
            record["spike_deviations"] = self._deviations
        if record["updated"]:
            self.detector.add(record["loss"])
        else:  # with the verdict TAKE, the optimizer left the update out because gradients were not finite
            record["skipped"] = "spike" if self.verdict is Verdict.SPIKE else "not finite"
        if spike or not record["updated"]:
            record["sample_ids"] = batch.ids_B2.tolist()
        self._check_patience(record)
        self._check_limit(record)

    def _is_spike(self) -> bool:
        return 0 < self.config.spike_deviations < self._deviations

    def _check_patience(self, record: dict[str, Any]) -> None:
        patience = self.config.max_not_finite_steps
        self.not_finite = self.not_finite + 1 if record.get("skipped") == "not finite" else 0
        if self.not_finite == patience:
            raise TrainingError(
                f"gradients were not finite at {patience} steps in a row, up to step {record['step']}; none of them "
                "changed the weights. Lower the learning rates (optimizer.matrix_lr, …) or set "
                "optimizer.clip_grad=1.0, and start again: the run resumes from its newest checkpoint"
            )

    def _check_limit(self, record: dict[str, Any]) -> None:
        limit, within = self.config.max_skips, self.config.max_skips_within
        if "skipped" in record:
            self.skipped.append(record["step"])
        self.skipped = [step for step in self.skipped if step > record["step"] - within]
        if len(self.skipped) > limit:
            raise TrainingError(
                f"{len(self.skipped)} of the last {within} steps were skipped ({', '.join(map(str, self.skipped))}), "
                f"more than health.max_skips={limit}. Look at their sample_ids in metrics.jsonl and at the learning "
                "rates; to go on from the newest checkpoint regardless, raise health.max_skips or "
                "health.spike_deviations, or set health.on_spike=warn"
            )
