"""What lies in the folder of a run, and under which names. Imports nothing heavy.

RUN/recipe.yaml, RUN/tokenizer/          what the run was started with
RUN/starts.jsonl                         when, by which code and with which recipe it was started, and how that ended
RUN/metrics.jsonl                        a line of metrics for each step
RUN/checkpoints/step_00000200/           one complete checkpoint
RUN/checkpoints/step_00000400.1f3a.saving/   being written or removed; never read, deleted by the next save
RUN/checkpoints/step_00000600.damaged/   not what its manifest says; set aside, never deleted
RUN/lease.json                           which process trains the run now
RUN/restarts.json                        starts in a row that brought no new checkpoint
RUN/evaluations/step_00000200.json       scores of a checkpoint, written by an evaluation of its own
RUN/stacks/rank_00003.txt                where a rank was when the run hung
RUN/tensorboard/                         the metrics for TensorBoard
RUN/wandb_id                             the run's name at Weights & Biases
RUN/origin.json                          in a run that was converted: from what, at which step
"""

from __future__ import annotations

import re
from pathlib import Path

from bov_megatron.errors import CheckpointError

RECIPE, TOKENIZER, STARTS, METRICS = "recipe.yaml", "tokenizer", "starts.jsonl", "metrics.jsonl"
CHECKPOINTS, SAVING, DAMAGED = "checkpoints", ".saving", ".damaged"
LEASE, RESTARTS, STACKS, WANDB_ID = "lease.json", "restarts.json", "stacks", "wandb_id"
TENSORBOARD, ORIGIN, EVALUATIONS = "tensorboard", "origin.json", "evaluations"
_STEP = re.compile(r"step_(\d{8})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the complete checkpoint of `step`."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Step of a complete checkpoint by its folder's name; None for any other folder."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    folders = (run_dir / CHECKPOINTS).glob("step_*")
    return sorted((step, path) for path in folders if (step := step_of(path)) is not None)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(run_dir)
    return found[-1][1] if found else None


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of `step` (None: the newest) in a run folder; `run_dir` may also be a checkpoint's own folder.

    Raises CheckpointError where there is none.
    """
    if step is None and step_of(run_dir) is not None:
        return run_dir
    found = dict(list_checkpoints(run_dir))
    if not found:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint (looked for {CHECKPOINTS}/step_*)")
    if step is not None and step not in found:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def evaluation_path(run_dir: Path, step: int) -> Path:
    """Scores of the checkpoint of `step`, if it was evaluated on its own."""
    return run_dir / EVALUATIONS / f"step_{step:08d}.json"


def list_evaluations(run_dir: Path) -> list[Path]:
    """Scores of checkpoints that were evaluated on their own, oldest step first."""
    return sorted((run_dir / EVALUATIONS).glob("step_*.json"))


def run_dir_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint's folder lies in."""
    return checkpoint.parent.parent
