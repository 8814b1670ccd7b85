"""What happens around training steps. The trainer knows none of it: it calls each callback, on every rank, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bov_megatron.training.trainer import Trainer


class Callback:
    """Base of all callbacks; every method is called on every rank."""

    def start(self, trainer: Trainer) -> None:
        """At the start of the process; `trainer.step` steps are done already."""

    def before_first_step(self, trainer: Trainer) -> None:
        """All callbacks have started."""

    def after_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each optimizer step. `record` is the step's line of metrics; a callback may add to it for those
        that come after."""

    def before_roll_back(self, trainer: Trainer) -> None:
        """All ranks have decided to go back to the newest checkpoint; nothing has happened yet."""

    def after_line(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """After something that is no step and has a line of metrics of its own: the run has rolled back to
        `trainer.step` (Health.roll_back), or made up for a validation."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, or the one after which the run was told to stop; not called when training raises."""
