"""Numbers that go wrong: steps that are skipped, steps that are remarked on, and runs that are ended."""

from __future__ import annotations

import enum
import math
from typing import Any

from bov_megatron.recipe import HealthConfig
from bov_megatron.training.callbacks import Callback, TrainingError
from bov_megatron.training.spikes import SpikeDetector


class Verdict(enum.IntEnum):
    """On a step, before its update; of several ranks' verdicts the highest counts."""

    TAKE = 0
    SPIKE = 1
    NOT_FINITE = 2


class Health(Callback):
    """Judges each step's loss before the update, and ends a run that skips too many steps.

    Steps whose loss or gradients are not finite are skipped; those whose loss is a spike as `health.on_spike` says. A
    skipped step changes neither weights nor optimizer state. Its line of metrics says `skipped` and, as that of a
    spike, `sample_ids`: pairs (stream, sample) of the global batch.

    Args:
        config: the recipe's section.
        state: what `state()` gave when the checkpoint was saved that the run goes on from.
    """

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None):
        state = state or {}
        self.config = config
        self.detector = SpikeDetector(config.spike_window, state.get("losses"))
        self.skipped: list[int] = list(state.get("skipped", []))
        """Steps, of the last `max_skips_within`."""
        self.not_finite: int = state.get("not_finite", 0)
        """Steps on end."""
        self.verdict = Verdict.TAKE
        """What all ranks agreed on for the step at hand."""
        self._deviations = 0.0

    def state(self) -> dict[str, Any]:
        """What the next judgements depend on."""
        return {"losses": self.detector.losses(), "skipped": list(self.skipped), "not_finite": self.not_finite}

    def judge(self, loss: float) -> Verdict:
        """This rank's verdict on the step with this loss."""
        self._deviations = self.detector.deviations(loss)
        if not math.isfinite(loss):
            return Verdict.NOT_FINITE
        return Verdict.SPIKE if self._is_spike() and self.config.on_spike == "skip" else Verdict.TAKE

    def after_step(self, trainer, record):
        spike = self._is_spike() or self.verdict is Verdict.SPIKE
        if spike:
            record["spike_deviations"] = self._deviations
        if record["updated"]:
            self.detector.add(record["loss"])
        else:  # where the verdict was to take it, the optimizer found gradients that are not finite
            record["skipped"] = "spike" if self.verdict is Verdict.SPIKE else "not finite"
        if spike or not record["updated"]:
            record["sample_ids"] = trainer.batch.ids_B2.tolist()
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
