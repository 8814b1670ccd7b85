"""Numbers that go wrong: steps that are skipped or remarked on, runs that are rolled back or ended."""

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
    """On a step, before its update."""

    TAKE = enum.auto()
    SPIKE = enum.auto()
    NOT_FINITE = enum.auto()


class Health:
    """Judges each step before its update, and ends a run that skips too many steps.

    Steps whose loss or gradients are not finite are skipped; those whose loss is a spike as `health.on_spike` says. A
    skipped step changes neither weights nor optimizer state. Its line of metrics says `skipped` and, as that of a
    spike, `sample_ids`: pairs (stream, sample) of the global batch.

    With `on_spike: rollback` the trainer asks `must_roll_back` after each step, and where it must, on all ranks alike,
    tells `roll_back` which checkpoint it went back to.

    Args:
        config: the recipe's section.
        state: what `state()` gave when the checkpoint was saved that the run goes on from.
    """

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None):
        self.config = config
        self.rollbacks: list[dict[str, Any]] = list((state or {}).get("rollbacks", []))
        """Of the whole run: `number` (from 1), `reason`, `from_step`, `to_step`, `first_batch`, `last_batch`."""
        self._take(state or {})
        self.verdict = Verdict.TAKE
        """On the step at hand; the same on every rank, as all judge the same numbers."""
        self._deviations = 0.0

    def _take(self, state: dict[str, Any]) -> None:
        self.detector = SpikeDetector(self.config.spike_window, state.get("losses"))
        self.skipped: list[int] = list(state.get("skipped", []))
        """Steps, of the last `max_skips_within`."""
        self.not_finite: int = state.get("not_finite", 0)
        """Steps on end."""

    def state(self) -> dict[str, Any]:
        """What the next judgements, and the samples to come, depend on."""
        return {
            "losses": self.detector.losses(),
            "skipped": list(self.skipped),
            "not_finite": self.not_finite,
            "rollbacks": [dict(one) for one in self.rollbacks],
        }

    def skipped_windows(self) -> list[tuple[int, int]]:
        """What roll backs have left out of the data's order: 0-based places (first, last) of batches."""
        return [(one["first_batch"], one["last_batch"]) for one in self.rollbacks]

    def judge(self, loss: float, gradient_norm: float = 0.0) -> Verdict:
        """The verdict on a step, by numbers that all ranks have agreed on; `gradient_norm` only where it is known."""
        self._deviations = self.detector.deviations(loss)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.verdict = Verdict.NOT_FINITE
        elif self._is_spike() and self.config.on_spike != "warn":
            self.verdict = Verdict.SPIKE
        else:
            self.verdict = Verdict.TAKE
        return self.verdict

    def must_roll_back(self, record: dict[str, Any]) -> bool:
        """Whether the step that was just left out is one to go back for; the same on every rank."""
        if self.config.on_spike != "rollback" or record["updated"]:
            return False
        return self.verdict is Verdict.SPIKE or self.not_finite + 1 >= self.config.max_not_finite_steps

    def check_may_roll_back(self, record: dict[str, Any]) -> None:
        """Raise TrainingError where the run has rolled back `max_rollbacks` times before."""
        limit = self.config.max_rollbacks
        if len(self.rollbacks) < limit:
            return
        before = ", ".join(f"{one['from_step']} to {one['to_step']}" for one in self.rollbacks) or "none"
        raise TrainingError(
            f"{self.complaint(record)}, and the run has rolled back health.max_rollbacks={limit} times before (from "
            f"step, to step: {before}). Look at the rollback lines of metrics.jsonl and at the learning rates; to go "
            "on from the newest checkpoint regardless, raise health.max_rollbacks or health.spike_deviations, or set "
            "health.on_spike=skip"
        )

    def complaint(self, record: dict[str, Any]) -> str:
        """What is wrong with a step to be rolled back, as the beginning of an error."""
        if self.verdict is Verdict.SPIKE:
            return f"the loss of step {record['step']} is a spike, {self._deviations:.0f} deviations above those before"
        return f"gradients were not finite at {self.not_finite + 1} steps on end, up to step {record['step']}"

    def roll_back(
        self, record: dict[str, Any], batch: TrainBatch, to_step: int, state: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Judge as after `to_step`, and leave out the samples since; returns the line for metrics.

        Args:
            record, batch: of the step that went wrong.
            to_step, state: of the checkpoint gone back to.
        """
        told = {
            "number": len(self.rollbacks) + 1,
            "reason": "spike" if self.verdict is Verdict.SPIKE else "not finite",
            "from_step": record["step"],
            "to_step": to_step,
            "first_batch": SkippedBatches(self.skipped_windows()).place(to_step),
            "last_batch": batch.place,
        }
        self.rollbacks.append(told)
        self._take(state or {})
        of_the_step = {key: record[key] for key in ("loss", "gradient_norm", "digest")}
        of_the_step |= {"spike_deviations": self._deviations, "sample_ids": batch.ids_B2.tolist()}
        return {"step": to_step, "rollback": {**told, **of_the_step}}

    def note(self, record: dict[str, Any], batch: TrainBatch) -> None:
        """Remember a step, and add to its line of metrics what was wrong with it.

        Raises TrainingError where that has happened too often.
        """
        spike = self._is_spike() or self.verdict is Verdict.SPIKE
        if spike:
            record["spike_deviations"] = self._deviations
        if record["updated"]:
            self.detector.add(record["loss"])
        else:  # where the verdict was to take it, the optimizer found gradients that are not finite
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
                f"gradients were not finite at {patience} steps on end, up to step {record['step']}; weights are "
                "those before. Lower the learning rates (optimizer.matrix_lr, …) or set optimizer.clip_grad=1.0, and "
                "start again: the run continues from its newest checkpoint"
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
