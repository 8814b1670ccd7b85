"""What happens around training steps. The trainer knows none of it: it calls each callback, on every rank, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bov_megatron.training.trainer import Trainer


class Callback:
    """Base of all callbacks; every method is called on every rank."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.step` steps are done already."""

    def after_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each optimizer step. `record` is the step's line of metrics; a callback may add to it for those
        that come after."""

    def finish_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Once before the first step of a run that was stopped while it validated: `record` is the line of that
        step, done by the start before, which lacks the validation."""

    def before_roll_back(self, trainer: Trainer) -> None:
        """All ranks have decided to go back to the newest checkpoint; nothing has happened yet."""

    def rolled_back(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """The run has gone back to `trainer.step`: in place of `after_step` for the step that went wrong. `line` is
        what metrics say of it (Health.roll_back)."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, or the one after which the run was told to stop; not called when training raises."""
