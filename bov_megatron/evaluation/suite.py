"""What a recipe's section `evaluation` lists, opened and checked, and scored on an engine in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from megatron.core import parallel_state

from bov_megatron.data.loader import ValidationLoader
from bov_megatron.data.opening import open_together
from bov_megatron.data.shards import open_data_sets
from bov_megatron.data.tokenizer import bytes_per_token, load_encoder
from bov_megatron.errors import BovError, DataError, EvaluationError, RecipeError
from bov_megatron.evaluation.bits_per_byte import score_held_out
from bov_megatron.evaluation.core import bundle as bundles
from bov_megatron.evaluation.core.counting import TaskItems, count_right
from bov_megatron.evaluation.core.evaluation import mean_scores
from bov_megatron.evaluation.lm_eval_tasks import LoadedTasks, OptionNames, load_tasks
from bov_megatron.evaluation.quiet import quiet_libraries
from bov_megatron.parallel.agreement import on_all_ranks, on_first_rank
from bov_megatron.parallel.device import device
from bov_megatron.recipe import DataConfig, HeldOutConfig, Recipe
from bov_megatron.recipe.limits import nearest

if TYPE_CHECKING:
    from bov_megatron.engines.base import Engine

T = TypeVar("T")

OPTIONS = OptionNames("evaluation.tasks=", "evaluation.tasks_dir=")
PREFIX = "evaluation/"


class Suite:
    """Held-out sets, lm-eval tasks and CORE tasks of `recipe.evaluation`.

    Args:
        tokenizer_folder: the model's; held-out sets of another tokenizer are refused.
        together: all ranks make theirs at the same time. Rank 0 reads the tokenizer and CORE's tasks and sends them,
            each node's first rank reads what describes the held-out sets, whose samples data-parallel ranks share.
            lm-eval's tasks can't be sent: every rank reads their data.

    Raises DataError, EvaluationError or RecipeError for what is missing, unknown or not the model's; the message names
    the field.
    """

    def __init__(self, recipe: Recipe, tokenizer_folder: Path, together: bool = False):
        self.config = recipe.evaluation
        on_first, on_all = (on_first_rank, on_all_ranks) if together else (_here, _here)
        self.encoder = on_first(lambda: load_encoder(tokenizer_folder))
        self.held_out = {
            held_out.name: self._open(recipe, number, held_out, together)
            for number, held_out in enumerate(self.config.held_out)
        }
        self.tasks = on_all(lambda: self._load_tasks(recipe))
        self.core = on_first(self._core_tasks)

    def describe(self) -> str:
        """What there is to score, in a few words."""
        parts = [f"held-out sets {', '.join(self.held_out)}"] * bool(self.held_out)
        parts += [f"lm-eval tasks {', '.join(self.config.tasks)}"] * bool(self.tasks)
        parts += [f"{len(self.core)} tasks of CORE"] * bool(self.core)
        return "; ".join(parts)

    def score(self, engine: Engine, must_stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Scores by the names that they have in the metrics, the same on every rank, or None where they were cut short;
        collective over all ranks of the engine.

        Args:
            must_stop: asked by all ranks together between forward passes; the answer is the same on all.
        """

        def between() -> None:
            if must_stop():
                raise _CutShort

        try:
            scores = self._held_out_scores(engine, must_stop)
            scores |= self._task_scores(engine, between)
            scores |= self._core_scores(engine, between)
        except _CutShort:
            return None
        return {PREFIX + name: score for name, score in scores.items() if math.isfinite(score)}

    def _held_out_scores(self, engine: Engine, must_stop: Callable[[], bool]) -> dict[str, float]:
        sizes, scores = torch.from_numpy(bytes_per_token(self.encoder)).to(device()), {}
        for name, loader in self.held_out.items():
            if (score := score_held_out(engine, loader, sizes, must_stop)) is None:
                raise _CutShort
            scores[f"bits_per_byte/{name}"] = score.bits_per_byte
        return scores

    def _task_scores(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        if not self.tasks:
            return {}
        from bov_megatron.evaluation.lm_eval_engine import EngineLM

        with quiet_libraries():
            model = EngineLM(engine, self.encoder, self.config.batch_size, bos=True, between=between)
            found = self.tasks.run(model, self.config.limit, self.config.num_fewshot)
        scores = on_first_rank(lambda: found["scores"])  # others than a node's first have none
        return {f"{task}/{metric}": value for task, metrics in scores.items() for metric, value in metrics.items()}

    def _core_scores(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        if not self.core:
            return {}
        found = count_right(
            engine,
            self.encoder,
            self.core,
            limit=self.config.limit,
            batch_size=self.config.batch_size,
            between=between,
        )
        centered = {f"core/{label}": scores["centered"] for label, scores in found.items()}
        if self.config.core_tasks:
            return centered | {"core_subset": sum(centered.values()) / len(centered)}
        return centered | {"core": mean_scores(found)["core"]}

    def _open(self, recipe: Recipe, number: int, held_out: HeldOutConfig, together: bool) -> ValidationLoader:
        where = f"evaluation.held_out[{number}] ({held_out.name})"
        data, model = DataConfig(path=held_out.path, remote=held_out.remote), recipe.model
        try:
            data_sets = (open_together if together else open_data_sets)(data, model.sequence_length, model.vocab_size)
            if (made_with := data_sets[0].manifest.tokenizer_hash) != self.encoder.hash:
                raise DataError(
                    f"{held_out.path} was made with tokenizer {made_with[:12]}, the model's is "
                    f"{self.encoder.hash[:12]}: prepare it again with --tokenizer set to the model's"
                )
            return ValidationLoader(
                data,
                tokens=recipe.evaluation.tokens,
                sequence_length=model.sequence_length,
                vocab_size=model.vocab_size,
                micro_batch_size=recipe.validation.micro_batch_size or recipe.train.micro_batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank() if together else 0,
                data_parallel_size=parallel_state.get_data_parallel_world_size() if together else 1,
                data_sets=data_sets,
            )
        except BovError as error:
            raise DataError(f"{where}: {error}") from error

    def _load_tasks(self, recipe: Recipe) -> LoadedTasks | None:
        if not self.config.tasks:
            return None
        with quiet_libraries():
            tasks = load_tasks(self.config.tasks, self.config.tasks_dir, OPTIONS)
        _check_generation(tasks, recipe)
        return tasks

    def _core_tasks(self) -> list[TaskItems]:
        if self.config.core is None:
            return []
        bundle = bundles.read_bundle(Path(self.config.core), "evaluation.core=")
        by_label = {task.label: task for task in bundle.tasks}
        for label in self.config.core_tasks:
            if label not in by_label:
                raise RecipeError(f"evaluation.core_tasks: {label!r} is not in the bundle{nearest(label, by_label)}")
        chosen = [by_label[label] for label in self.config.core_tasks] or bundle.tasks
        return [TaskItems(task, task.read_items()) for task in chosen]


def _check_generation(tasks: LoadedTasks, recipe: Recipe) -> None:
    from bov_megatron.evaluation.lm_eval_engine import generation_options

    for name, options in tasks.generating().items():
        where = f"{OPTIONS.tasks}{name}"
        try:
            generation_options(options, recipe.model.sequence_length)
        except EvaluationError as error:
            raise EvaluationError(f"{where}: {error}") from None
        if recipe.engine == "deepspeed" and recipe.deepspeed.zero_stage == 3:
            raise EvaluationError(
                f"{where} generates answers, with more forward passes on one data-parallel rank than on another, "
                "and under deepspeed.zero_stage=3 all ranks gather the weights of each together: leave it out, or "
                "use another stage"
            )


def _here(function: Callable[[], T]) -> T:
    return function()


class _CutShort(Exception):
    """Ends an evaluation, on all ranks at the same place."""
