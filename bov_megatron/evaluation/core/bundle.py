"""Reading DCLM's evaluation bundle: which tasks, their items, and what guessing scores.

core.yaml             icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
eval_data/…           a JSONL file per task
eval_meta_data.csv    columns "Eval Task" and "Random baseline", in percent
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.errors import EvaluationError

KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""How a task is scored -> fields of its items."""
LISTS = ("choices", "context_options")
"""Those fields with a text for each option; the others but `gold` are one."""
NOT_IN_CORE = "hellaswag_zeroshot"
"""DCLM averages 22 tasks, HellaSwag twice: with 0 and with 10 shots. The paper's 21 are those without the former."""
SHUFFLE_SEED = 1337

BASELINES = {
    "dclm-2025-09-05": {
        "commonsense_qa": 40.3,
        "bigbench_language_identification": 25.0,
        "agi_eval_lsat_ar": 25.0,
    },
    "dclm-original": {
        "commonsense_qa": 20.0,
        "bigbench_language_identification": 9.1,
        "agi_eval_lsat_ar": 20.0,
    },
}
"""The two sets of baselines in circulation differ in three tasks, in percent: DCLM corrected them on 2025-09-05."""
WHERE_FROM = (
    "the bundle is that of DCLM (github.com/mlfoundations/dclm, `eval/`; nanochat's speedrun downloads a copy as "
    "eval_bundle.zip): a folder with core.yaml, eval_meta_data.csv and eval_data/"
)


@dataclass(frozen=True)
class Task:
    label: str
    kind: str
    """A key of KINDS."""
    path: Path
    shots: int
    delimiter: str
    """Between a question and its answer."""
    baseline: float
    """Accuracy of guessing, a share."""

    def centered(self, accuracy: float) -> float:
        """0 for guessing, 1 for all right."""
        return (accuracy - self.baseline) / (1 - self.baseline)

    def read_items(self) -> list[dict[str, Any]]:
        """All items in the order that scores refer to: the file's, shuffled once.

        Raises EvaluationError for a file that is no task of this kind, or that has no more items than shots.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise EvaluationError(f"{self.path} is no text in UTF-8; {WHERE_FROM}") from None
        items = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                items.append(self._item(line, f"{self.path}:{number}"))
        if len(items) <= self.shots:
            raise EvaluationError(
                f"task {self.label}: {self.path} has {len(items)} items, not more than its {self.shots} shots; "
                f"is the file whole? {WHERE_FROM}"
            )
        random.Random(SHUFFLE_SEED).shuffle(items)
        return items

    def _item(self, line: str, where: str) -> dict[str, Any]:
        try:
            item = json.loads(line)
        except ValueError:
            raise EvaluationError(f"{where}: no JSON object; is the bundle whole?") from None
        wanted = KINDS[self.kind]
        missing = [field for field in wanted if not isinstance(item, dict) or field not in item]
        if missing:
            raise EvaluationError(
                f"{where}: an item of a {self.kind} task needs {', '.join(wanted)}; missing: {', '.join(missing)}"
            )
        for field in wanted:
            texts = item[field] if field in LISTS else [item[field]]
            if field != "gold" and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                what = "a list of texts" if field in LISTS else "a text"
                raise EvaluationError(f"{where}: {field} is {item[field]!r}, but must be {what}")
        if self.kind != "language_modeling":
            options, gold = item[wanted[0] if self.kind == "schema" else "choices"], item["gold"]
            if not isinstance(gold, int) or not 0 <= gold < len(options):
                raise EvaluationError(f"{where}: gold is {gold!r}, but must be the number of an option, counted from 0")
        return item


@dataclass(frozen=True)
class Bundle:
    folder: Path
    tasks: tuple[Task, ...]
    baselines: str
    """Which set of baselines `eval_meta_data.csv` has: a key of BASELINES, or `bundle` for one of its own."""
    digest: str
    """Of its tasks, baselines and data."""

    def under_baselines(self, name: str) -> tuple[Task, ...]:
        """The tasks with the baselines of another set."""
        return tuple(
            dataclasses.replace(task, baseline=BASELINES[name].get(task.label, 100 * task.baseline) / 100)
            for task in self.tasks
        )


def read_bundle(folder: Path, option: str = "--core ") -> Bundle:
    """The bundle in `folder`, every item of which can be scored. Raises EvaluationError for another layout or a half
    bundle; the message begins with what the caller calls the option."""
    listing, metadata = folder / "core.yaml", folder / "eval_meta_data.csv"
    for path in (listing, metadata, folder / "eval_data"):
        if not path.exists():
            raise EvaluationError(f"{option}{folder}: {path.name} is missing; {WHERE_FROM}")
    percent = _baselines(metadata)
    tasks = tuple(_task(entry, folder, percent, option) for entry in _entries(listing))
    labels = [task.label for task in tasks]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise EvaluationError(f"{listing}: {', '.join(sorted(twice))} stands in it twice")
    for task in tasks:
        task.read_items()  # now, not when hours later the task's turn comes
    digest = hashlib.sha256()
    for path in (listing, metadata, *(task.path for task in tasks)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Bundle(folder, tasks, _set_of_baselines(percent, labels), digest.hexdigest())


def _set_of_baselines(percent: dict[str, float], labels: Sequence[str]) -> str:
    for name, differing in BASELINES.items():
        present = [label for label in labels if label in differing]
        if present and all(percent[label] == differing[label] for label in present):
            return name
    return "bundle"


def _entries(listing: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(listing.read_text())["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise EvaluationError(f"{listing}: no list `icl_tasks` of tasks; {WHERE_FROM}")
    return entries


def _task(entry: dict[str, Any], folder: Path, percent: dict[str, float], option: str) -> Task:
    listing = folder / "core.yaml"
    try:
        label, kind = str(entry["label"]), entry["icl_task_type"]
        path, (shots,) = folder / "eval_data" / entry["dataset_uri"], entry["num_fewshot"]
        shots = int(shots)
    except (KeyError, TypeError, ValueError):
        raise EvaluationError(
            f"{listing}: {entry.get('label', 'a task')}: needs label, dataset_uri, icl_task_type and num_fewshot: [N]"
        ) from None
    if kind not in KINDS:
        raise EvaluationError(f"{listing}: {label}: icl_task_type {kind!r} is none of {', '.join(KINDS)}")
    if not path.is_file():
        raise EvaluationError(f"{option}{folder}: {path.relative_to(folder)} of task {label} is missing; {WHERE_FROM}")
    if label not in percent:
        raise EvaluationError(
            f"{folder / 'eval_meta_data.csv'}: no row for {label}, so what guessing scores is unknown"
        )
    return Task(label, kind, path, shots, entry.get("continuation_delimiter", " "), percent[label] / 100)


def _baselines(metadata: Path) -> dict[str, float]:
    """Accuracy of guessing by task, in percent."""
    with metadata.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"Eval Task", "Random baseline"} <= rows[0].keys():
        raise EvaluationError(f"{metadata}: needs columns 'Eval Task' and 'Random baseline'; {WHERE_FROM}")
    percent = {}
    for row in rows:
        try:
            value = float(row["Random baseline"])
        except (TypeError, ValueError):
            continue  # of a task that is not in CORE
        percent[row["Eval Task"]] = value
    if bad := [label for label, value in percent.items() if not 0 <= value < 100]:
        raise EvaluationError(f"{metadata}: the baseline of {bad[0]} is {percent[bad[0]]}, not a percentage below 100")
    return percent
