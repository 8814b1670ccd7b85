"""Exit statuses of a run, and the errors that end it with one. Every message says what was found and what to do.

Imports nothing, so that a launcher may ask on a node where the framework need not be installed.
"""

from __future__ import annotations

DONE = 0
CRASHED = 1
"""Python's own, for an error nobody caught; likewise 137 and 139 for a killed process."""
CANNOT_START = 2
"""Recipe, data, checkpoint or run folder cannot be used: starting again would fail again."""
NOT_WORTH_GOING_ON = 3
"""The run ended itself: numbers that went wrong too often. A person should look first."""
HANG = 4
"""No step for `health.hang_minutes`: stacks were written, starting again may help."""
CTRL_C = 130
"""The status of SIGINT: a tool ended by Ctrl-C, or a run by the second one."""
INTERRUPTED = 143
"""The status of SIGTERM: a run ended by a signal (the first Ctrl-C too) or `train.max_minutes`. All steps done are
saved; start again to go on."""


class BovError(Exception):
    """Base of the errors that a user can mend. A command prints the message in one line, without a traceback."""

    exit_status = CANNOT_START


class RecipeError(BovError, ValueError):
    """A recipe that cannot be run. The message names the field, the value found and the remedy."""


class StudyError(BovError, ValueError):
    """A study file, folder or table of runs that cannot be used. The message names what was found and the remedy."""


class ThisRankError(BovError, RuntimeError):
    """An error of this rank alone, such as a damaged shard that no other rank reads: the others only see it gone."""


class LaunchError(BovError, RuntimeError):
    """An environment from which rank and world size cannot be told. The message names variable and remedy."""


class DataError(BovError, ValueError):
    """Data that can't be prepared or read. The message names what was asked for, what was found and the remedy."""


class CheckpointError(BovError, RuntimeError):
    """A checkpoint that cannot be read or doesn't belong to this run; the message says what to do."""


class RunFolderError(BovError, RuntimeError):
    """The run folder is held by another start (the message says which, and since when), or cannot be written."""


class TrainingError(BovError, RuntimeError):
    """A run that is not worth going on with; the message says why and what to do."""

    exit_status = NOT_WORTH_GOING_ON


class ExportError(BovError, ValueError):
    """An export that cannot be made. The message names what was found and the remedy."""


class ConversionError(BovError, ValueError):
    """A checkpoint or export that can't become a run. The message names what was found and the remedy."""


class EvaluationError(BovError, ValueError):
    """An evaluation that cannot be made. The message names what was found and the remedy."""
