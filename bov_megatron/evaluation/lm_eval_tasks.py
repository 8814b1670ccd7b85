"""lm-eval on an export or a checkpoint: its own tasks and local YAML tasks.

lm-eval is imported inside functions because that takes seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bov_megatron.errors import EvaluationError
from bov_megatron.lifecycle.terminal import say

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OptionNames:
    """What the caller calls its options, for messages."""

    tasks: str = "--tasks "
    tasks_dir: str = "--tasks-dir "


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups with their data."""

    manager: TaskManager
    tasks: list[Task | Group]

    def generating(self) -> dict[str, dict]:
        """The tasks whose answers are generated, and how."""
        single = [
            task for loaded in self.tasks for task in (loaded.get_all_tasks() if hasattr(loaded, "add") else [loaded])
        ]
        return {
            task.task_name: dict(task.config.generation_kwargs or {})
            for task in single
            if task.OUTPUT_TYPE == "generate_until"
        }

    def run(self, lm: LM, limit: float | None = None, num_fewshot: int | None = None) -> dict:
        """Evaluate a model; returns lm-eval's results as `summarize` gives them; nothing on any but a node's first
        rank.

        Args:
            limit: examples per task; below 1, a share of them.
        """
        from lm_eval import simple_evaluate

        results = simple_evaluate(
            model=lm,
            tasks=list(self.tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=self.manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
        return summarize(results) if results else {}


def load_tasks(
    tasks: Sequence[str], tasks_dir: str | Path | None = None, options: OptionNames | None = None
) -> LoadedTasks:
    """Find tasks and read their data.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        tasks_dir: folder of local YAML tasks. lm-eval's own tasks, which take half a minute to index, are only searched
            for names not found here.

    Raises EvaluationError for unknown tasks, and for tasks whose data set cannot be had.
    """
    options = options or OptionNames()
    manager, names = find_tasks(tasks, tasks_dir, options)
    return LoadedTasks(manager, [task for name in names for task in load_task(manager, name, options)])


def find_tasks(
    tasks: Sequence[str], tasks_dir: str | Path | None, options: OptionNames | None = None
) -> tuple[TaskManager, list[str]]:
    """A task manager that knows `tasks`, and their names in it."""
    from lm_eval.tasks import TaskManager

    said = options or OptionNames()
    if not tasks:
        raise EvaluationError(f"{said.tasks}names no task")
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise EvaluationError(f"{said.tasks_dir}{tasks_dir} is not a folder")
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise EvaluationError(f"{said.tasks}{task}: no such file")
    names = [str(Path(task).resolve()) if Path(task).is_file() else task for task in tasks]
    include = None if tasks_dir is None else str(Path(tasks_dir).resolve())
    manager = TaskManager(include_path=include, include_defaults=False)
    unknown = _unknown(names, manager)
    if unknown:
        say(f"{', '.join(unknown)}: not among local tasks; indexing lm-eval's own, about half a minute")
        manager = TaskManager(include_path=include, include_defaults=True)
        unknown = _unknown(names, manager)
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists lm-eval's own"
        raise EvaluationError(f"{said.tasks}{unknown[0]}: neither a local task nor one of lm-eval's; {hint}")
    return manager, names


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if not Path(name).is_file() and not manager.match_tasks([name])]


def load_task(manager: TaskManager, name: str, options: OptionNames) -> list[Task | Group]:
    """The task, group or tag `name` with its data; a tag gives several tasks. Raises EvaluationError."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # of lm-eval, datasets, huggingface_hub, httpx: they share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = (
            "if its data set is on the Hugging Face hub, this needs network, or a cache filled by an earlier run; "
            f"without, give tasks over local files with {options.tasks_dir.rstrip(' =')}"
        )
        raise EvaluationError(f"{options.tasks}{name} could not be loaded ({reason}); {remedy}") from None
    members = {member for group in loaded["groups"].values() for member in group.child_names}
    every = {**loaded["tasks"], **loaded["groups"]}
    return [task for key, task in every.items() if key not in members]


def as_lm_eval_model(model: PreTrainedModel, tokenizer_dir: Path, *, batch_size: int, bos: bool) -> HFLM:
    """lm-eval's own class for transformers models. With `bos`, prompts start with `<|bos|>`, as documents do in
    training."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    class BosModel(HFLM):
        """Starts prompts with `<|bos|>`."""

        # lm-eval's `add_bos_token` leaves that to the tokenizer, and doubles it in rolling tasks, where lm-eval itself
        # puts it before the text.

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            context_ids, continuation_ids = super()._encode_pair(context, continuation)
            return ([self.prefix_token_id] if bos else []) + context_ids, continuation_ids

        def tok_batch_encode(self, strings: list[str], *arguments, **options):
            prefix = self.tokenizer.bos_token if bos else ""
            return super().tok_batch_encode([prefix + string for string in strings], *arguments, **options)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            # Called once per batch in rolling tasks, which would draw a progress bar each time.
            return super()._loglikelihood_tokens(requests, disable_tqdm or override_bs is not None, override_bs)

    return BosModel(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(str(tokenizer_dir)),
        batch_size=batch_size,
        add_bos_token=False,
    )


def summarize(results: dict) -> dict:
    """lm-eval's results as `{"scores": {task: {metric: value}}, "samples", …}`; `<metric>_stderr` is its error."""
    table: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        table[task] = {
            # lm-eval's keys are metric and filter: "acc,none", "acc_stderr,none".
            key.removesuffix(",none").replace(",", "_"): value
            for key, value in values.items()
            if isinstance(value, int | float) and "," in key
        }
    return {
        "scores": table,
        "samples": {task: count["effective"] for task, count in results["n-samples"].items()},
        "num_fewshot": results["n-shot"],
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")},
    }
