"""From an item of a task to the token sequences that are scored, as arXiv 2606.02780 does it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bov_megatron.data.tokenizer import Encoder
from bov_megatron.evaluation.core.bundle import Task

SHOTS_SEED = 1234
"""Item i's shots are drawn with SHOTS_SEED + i."""


@dataclass(frozen=True)
class Option:
    """One of the sequences that an item asks about."""

    ids: list[int]
    """At most as long as the model's context; `<|bos|>` first unless cropped."""
    start: int
    """The tokens from here to the end are scored; at least 1, and at least one token."""

    @property
    def scored(self) -> list[int]:
        return self.ids[self.start :]


@dataclass(frozen=True)
class Question:
    """An item as the model sees it: one option per choice; of language modelling one in all."""

    task: Task
    index: int
    """Of the item among the task's shuffled ones."""
    options: list[Option]
    gold: int | None
    """The right option; None where the option is right if all its scored tokens are the greedy choices."""

    @property
    def shared(self) -> int:
        """Length of what all options begin with and none is scored on."""
        return min(_common_prefix([option.ids for option in self.options]), *(o.start for o in self.options))


def questions(
    task: Task, items: Sequence[dict[str, Any]], indices: range, encoder: Encoder, context: int
) -> Iterator[Question]:
    """The items of these indices, each with its shots.

    Args:
        items: all of the task's (`task.read_items()`).
        context: longest sequence that the model takes, in tokens.
    """
    for index in indices:
        drawn = random.Random(SHOTS_SEED + index).sample(range(len(items) - 1), task.shots)
        shots = [items[place + (place >= index)] for place in drawn]  # of the others
        yield _question(task, index, items[index], shots, encoder, context)


def _question(
    task: Task, index: int, item: dict[str, Any], shots: Sequence[dict[str, Any]], encoder: Encoder, context: int
) -> Question:
    before = "".join(_answered(task, shot) + "\n\n" for shot in shots)
    texts = [before + text for text in _texts(task, item)]
    if task.kind == "language_modeling":
        # The context alone comes first. A space at its end would be a token that the whole text doesn't have.
        texts[0] = texts[0].rstrip()
    sequences = [[encoder.bos_token_id, *ids.tolist()] for ids in encoder.encode(texts)]
    if task.kind == "schema":  # the options differ before the scored continuation
        tail = _common_prefix([ids[::-1] for ids in sequences])
        starts = [len(ids) - tail for ids in sequences]
    else:
        starts = [_common_prefix(sequences)] * len(sequences)
    if task.kind == "language_modeling":
        sequences, starts = sequences[1:], starts[1:]
    options = [_cropped(ids, start, context) for ids, start in zip(sequences, starts, strict=True)]
    return Question(task, index, options, None if task.kind == "language_modeling" else item["gold"])


def _texts(task: Task, item: dict[str, Any]) -> list[str]:
    """What is scored, shots apart: the options; for language modelling the context without and with its end."""
    if task.kind == "multiple_choice":
        return [item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [context + task.delimiter + item["continuation"] for context in item["context_options"]]
    context = item["context"].strip() + task.delimiter
    return [context, context + item["continuation"]]


def _answered(task: Task, shot: dict[str, Any]) -> str:
    if task.kind == "language_modeling":
        return _texts(task, shot)[1]
    return _texts(task, shot)[shot["gold"]]


def _cropped(ids: list[int], start: int, context: int) -> Option:
    """The end of the sequence, as long as the model takes. There is something to score even where an option is the
    beginning of another one."""
    crop = max(len(ids) - context, 0)
    start = min(start, len(ids) - 1)
    return Option(ids[crop:], max(start - crop, 1))


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    for position in range(shortest):
        if any(ids[position] != sequences[0][position] for ids in sequences):
            return position
    return shortest
