"""A run from recipe to last checkpoint, on one rank of `python -m bov_megatron.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state

from bov_megatron import checkpoint, errors
from bov_megatron.checkpoint import compatibility
from bov_megatron.checkpoint.differences import find_differences, format_differences
from bov_megatron.data.loader import TrainLoader, ValidationLoader
from bov_megatron.data.opening import open_together
from bov_megatron.data.prompts import Prompts
from bov_megatron.data.shards import check_fingerprints, fingerprints
from bov_megatron.engines.base import Engine
from bov_megatron.engines.build import build_engine
from bov_megatron.errors import DataError, ThisRankError
from bov_megatron.evaluation.jobs import check_can_submit
from bov_megatron.evaluation.suite import Suite
from bov_megatron.lifecycle import exit_status, run_folder
from bov_megatron.lifecycle.interruption import StopReason, StopRequest, StopSignals
from bov_megatron.lifecycle.lease import Lease
from bov_megatron.lifecycle.starts import StartRecord
from bov_megatron.lifecycle.terminal import say
from bov_megatron.lifecycle.watchdog import Watchdog
from bov_megatron.parallel import launch, process_groups
from bov_megatron.parallel.agreement import on_all_ranks, on_first_rank
from bov_megatron.parallel.device import device
from bov_megatron.parallel.launch import World
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.identity import recipe_digest
from bov_megatron.recipe.layout_checks import parts_of_data
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.training.callbacks.checkpoints import Checkpoints
from bov_megatron.training.callbacks.evaluation import Evaluation
from bov_megatron.training.callbacks.evaluation_jobs import EvaluationJobs
from bov_megatron.training.callbacks.metrics_file import MetricsFile
from bov_megatron.training.callbacks.progress import Progress
from bov_megatron.training.callbacks.samples import Samples
from bov_megatron.training.callbacks.slowest_rank import SlowestRank
from bov_megatron.training.callbacks.tensorboard import TensorBoard
from bov_megatron.training.callbacks.validation import Validation
from bov_megatron.training.callbacks.value_statistics import ValueStatistics
from bov_megatron.training.callbacks.wandb import Wandb
from bov_megatron.training.health import Health
from bov_megatron.training.trainer import Trainer


def train(recipe: Recipe, world: World, signals: StopSignals) -> StopReason:
    """Train `recipe` on this rank of `world`, resuming from the newest checkpoint in its run folder, if any.

    Returns NONE where the run is complete, else why it stopped early; all steps done are then in a checkpoint.

    Raises BovError: the same on every rank, or a ThisRankError.
    """
    stop_request = StopRequest(signals, recipe.train.max_minutes, launch.job_end())
    process_groups.initialize(recipe, world.rank, world.world_size, world.local_rank)
    if reason := _agree_to_stop(stop_request()):  # before all that takes long
        return _leave(reason)
    watchdog = Watchdog(recipe.run_dir, world.rank, recipe.health.hang_minutes)
    with _run_folder(recipe, stop_request) as record, watchdog:
        stored = _find_stored(recipe)
        recipe = _with_parts_of_data(recipe, stored, world)
        if stored is not None and stored.is_end_of(recipe):
            _say(stored.describe_end(recipe))
            step, reason = stored.step, StopReason.NONE
            if record:
                record.begin(step)
        else:
            step, reason = _fit(recipe, stored, stop_request, watchdog, record)
        if record:
            record.end(step, _status(reason))
    return _leave(reason)


def _fit(
    recipe: Recipe,
    stored: StoredRun | None,
    stop_request: StopRequest,
    watchdog: Watchdog,
    record: StartRecord | None,
) -> tuple[int, StopReason]:
    """Train on; steps done, and why it stopped."""
    with _trainer(recipe, stored, stop_request, watchdog) as trainer:
        if record:
            record.begin(trainer.step)
        try:
            trainer.fit()
        except DataError as error:  # in a shard that other ranks need not read
            raise ThisRankError(str(error)) from error
    return trainer.step, StopReason.NONE if trainer.done else trainer.stop_reason


def _status(reason: StopReason) -> int:
    return errors.INTERRUPTED if reason else errors.DONE


def _agree_to_stop(own: StopReason) -> StopReason:
    """The highest of all ranks' reasons; collective."""
    reason = torch.tensor(int(own), device=device())
    dist.all_reduce(reason, op=dist.ReduceOp.MAX)
    return StopReason(int(reason))


def _leave(reason: StopReason) -> StopReason:
    """End the process groups after a run that `reason` has stopped, or none; collective."""
    if dist.get_rank() == 0:
        exit_status.report(_status(reason))
    # srun kills all ranks as soon as one exits with a status other than 0: wait for rank 0's report.
    dist.barrier()
    # Not after an error: other ranks may be inside a collective, and shutdown would wait for them.
    process_groups.shutdown()
    return reason


@contextlib.contextmanager
def _run_folder(recipe: Recipe, stop_request: StopRequest):
    """Hold the run folder's lease on rank 0, which also records the start; collective."""
    lease = Lease(recipe.run_dir)
    with contextlib.ExitStack() as stack:
        on_all_ranks(lambda: stack.enter_context(lease) if dist.get_rank() == 0 else None)
        stop_request.watch(lease)
        if dist.get_rank() == 0:
            yield stack.enter_context(StartRecord(lease, recipe_digest(recipe), dist.get_world_size()))
        else:
            yield None


@dataclass(frozen=True)
class StoredRun:
    """What the newest valid checkpoint of the run folder says of itself."""

    path: Path
    step: int
    recipe: dict
    extra: dict

    def owed(self, recipe: Recipe) -> set[str]:
        """What was due after `step` when the run was interrupted, and is still asked for; see trainer.OWABLE."""
        # Earlier checkpoints know of validation alone; those saved before version 0.1 hold the line of that step.
        early = self.extra.get("validation_owed") or self.extra.get("unfinished")
        owed = set(self.extra.get("owed", ["validation"] if early else []))
        return owed if recipe.evaluation.on_these_ranks else owed - {"evaluation"}

    def is_end_of(self, recipe: Recipe) -> bool:
        """Whether nothing of `recipe` is left to do."""
        steps = total_steps(recipe)
        return self.step > steps or (self.step == steps and not self.owed(recipe))

    def describe_end(self, recipe: Recipe) -> str:
        steps = total_steps(recipe)
        asked = "" if self.step == steps else f", more than the {steps} of this recipe, which is not stored"
        return f"{recipe.name} is finished: {self.step} steps are done{asked}; {self.path}. To go on, raise train.steps"


def _find_stored(recipe: Recipe) -> StoredRun | None:
    """The newest valid checkpoint of the run folder, if any; collective. Raises RecipeError where the recipe would
    change the order of its data."""
    newest = on_first_rank(lambda: run_folder.latest_checkpoint(recipe.run_dir))
    if newest is not None:
        _say(f"reading {newest} and comparing its checksums")
    path = checkpoint.newest_valid(recipe.run_dir)
    if path is None:
        return None
    stored = on_first_rank(lambda: checkpoint.read_run(path))
    compatibility.check_same_data_order(stored, recipe, path)
    return StoredRun(path, stored["step"], stored["recipe"], stored["extra"])


def _with_parts_of_data(recipe: Recipe, stored: StoredRun | None, world: World) -> Recipe:
    """The recipe with a number as data.num_canonical_nodes: the order of samples is that of the run's beginning."""
    if recipe.data.num_canonical_nodes is not None:
        return recipe
    parts = parts_of_data(recipe, world.world_size, world.local_world_size)
    if stored is not None and stored.extra["shards"] is not None:  # None in a run that was converted from elsewhere
        parts = stored.recipe["data"]["num_canonical_nodes"]
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_canonical_nodes=parts))


def _load_newest(engine: Engine) -> checkpoint.Loaded | None:
    """Go back to the newest valid checkpoint, if any; collective."""
    stored = _find_stored(engine.recipe)
    return None if stored is None else on_all_ranks(lambda: checkpoint.load(engine, stored.path))


@contextlib.contextmanager
def _trainer(recipe: Recipe, start: StoredRun | None, stop_request: StopRequest, watchdog: Watchdog):
    _say("building the model" + (f", and loading {start.path.name} into it" if start else ""))
    engine = build_engine(recipe)
    if start is not None:
        path = start.path
        on_all_ranks(lambda: checkpoint.load(engine, path))
    health = Health(recipe.health, start.extra.get("health") if start else None)
    _say("opening the data")
    train_loader, validation_loader = _open_data(recipe, start, health)
    bytes_per_token = on_first_rank(validation_loader.bytes_per_token)
    samples = _samples(recipe, validation_loader)
    evaluation = _evaluation(recipe, validation_loader)
    jobs = EvaluationJobs(recipe, total_steps(recipe)) if recipe.evaluation.where == "slurm" else None

    def saved(step: int, seconds: float) -> None:
        stop_request.note_save(seconds)
        if jobs:
            jobs.checkpoint_saved(step)

    with train_loader:
        _announce(recipe, start, train_loader)
        yield Trainer(
            engine,
            train_loader,
            [
                Validation(validation_loader, recipe.validation.interval),
                *([samples] if samples else []),
                *([evaluation] if evaluation else []),
                ValueStatistics(recipe.logging.table_interval),
                SlowestRank(recipe.logging.interval),
                Progress(recipe.logging.print_interval),
                Wandb(recipe.run_dir, recipe.logging.wandb, recipe.logging.wandb_project),
                TensorBoard(recipe.run_dir, recipe.logging.tensorboard),
                MetricsFile(recipe.run_dir, recipe.logging.interval),
                Checkpoints(
                    recipe.run_dir,
                    recipe.checkpoint,
                    from_step_0=recipe.health.on_spike == "rollback",
                    on_saved=saved,
                ),
                *([jobs] if jobs else []),
            ],
            bytes_per_token=_padded(bytes_per_token, recipe.model.vocab_size),
            start_step=start.step if start else 0,
            checkpoint_extra={
                "tokenizer_hash": train_loader.tokenizer_hash,
                "shards": fingerprints(train_loader.data_sets),
            },
            health=health,
            reload=functools.partial(_load_newest, engine),
            stop_request=stop_request,
            alive=watchdog.alive,
            owed=start.owed(recipe) if start else (),
        )


def _open_data(recipe: Recipe, start: StoredRun | None, health: Health) -> tuple[TrainLoader, ValidationLoader]:
    """This rank's loaders; collective."""
    tokenizer_hash = start.extra["tokenizer_hash"] if start else None
    data_sets = open_together(recipe.data, recipe.model.sequence_length, recipe.model.vocab_size, tokenizer_hash)
    if start and start.extra["shards"] is not None:  # None in a run that was converted from elsewhere
        check_fingerprints(data_sets, start.extra["shards"], start.step)
    common = {
        "sequence_length": recipe.model.sequence_length,
        "vocab_size": recipe.model.vocab_size,
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        "data_sets": data_sets,
    }

    def open_loaders() -> tuple[TrainLoader, ValidationLoader]:
        train_loader = TrainLoader(
            recipe.data,
            global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size,
            start_step=start.step if start else 0,
            skipped=health.skipped_windows(),
            **common,
        )
        validation_loader = ValidationLoader(
            recipe.data,
            tokens=recipe.validation.tokens,
            micro_batch_size=recipe.validation.micro_batch_size or recipe.train.micro_batch_size,
            **common,
        )
        return train_loader, validation_loader

    return on_all_ranks(open_loaders)


def _samples(recipe: Recipe, loader: ValidationLoader) -> Samples | None:
    if not recipe.validation.prompts:
        return None
    return Samples(on_first_rank(lambda: Prompts(recipe, loader.tokenizer_folder)))


def _evaluation(recipe: Recipe, loader: ValidationLoader) -> Evaluation | None:
    """What evaluates on this run's ranks; collective. Where jobs do, rank 0 checks that they will find everything."""
    if not recipe.evaluation.lists_anything:
        return None
    if recipe.evaluation.where == "slurm":

        def check() -> None:
            check_can_submit()
            Suite(recipe, loader.tokenizer_folder)

        on_first_rank(check)
        return None
    return Evaluation(Suite(recipe, loader.tokenizer_folder, together=True), recipe.evaluation)


def _announce(recipe: Recipe, start: StoredRun | None, loader: TrainLoader) -> None:
    """Store resolved recipe and tokenizer in the run folder, and print what starts; rank 0 only."""
    if dist.get_rank() != 0:
        return
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    # Conversion then needs only the run folder, not the data.
    shutil.copytree(loader.data_sets[0].tokenizer_folder, recipe.run_dir / run_folder.TOKENIZER, dirs_exist_ok=True)
    (recipe.run_dir / run_folder.RECIPE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    layout = recipe.parallel
    ranks = (
        f"{dist.get_world_size()} ranks: tensor {layout.tensor_model_parallel_size} × pipeline "
        f"{layout.pipeline_model_parallel_size} × context {layout.context_parallel_size} × data "
        f"{parallel_state.get_data_parallel_world_size()}"
    )
    begins = f"resuming after step {start.step}" if start else "from the beginning"
    say(f"{recipe.name}: {recipe.model.value.source}, {ranks}; {recipe.run_dir}; {begins}")
    if start and (differences := find_differences(start.recipe, recipe)):
        say(f"the recipe differs from that of {start.path.name}:\n{format_differences(differences)}")
    used, rows = loader.data_sets[0].manifest.vocab_size, recipe.model.vocab_size
    if used < rows:
        say(
            f"model.vocab_size={rows}, but the data's tokenizer has {used} ids: {rows - used} rows of the embedding, "
            f"of the output matrix and of each table stay untrained (model.vocab_size={used} leaves them out)"
        )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        say(text)


def _padded(bytes_per_token: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids beyond the tokenizer's count no bytes."""
    return torch.nn.functional.pad(bytes_per_token, (0, vocab_size - bytes_per_token.numel()))
