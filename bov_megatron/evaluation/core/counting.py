"""CORE's tasks on an engine in any layout, without keeping examples: only right answers are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.data.tokenizer import Encoder, bytes_per_token
from bov_megatron.engines.base import Engine
from bov_megatron.evaluation.core.bundle import Task
from bov_megatron.evaluation.core.evaluation import example, task_scores
from bov_megatron.evaluation.core.prompts import questions
from bov_megatron.evaluation.core.scorers import EngineScorer
from bov_megatron.parallel.device import device


@dataclass(frozen=True)
class TaskItems:
    """A task with its items, read once."""

    task: Task
    items: list[dict[str, Any]]

    def batches(self, limit: int | None, batch_size: int) -> Iterator[range]:
        """Indices of the items to score, in batches of at most `batch_size` options, unless one item has more."""
        count = len(self.items) if limit is None else min(limit, len(self.items))
        begin, options = 0, 0
        for index in range(count):
            more = _options(self.task, self.items[index])
            if index > begin and options + more > batch_size:
                yield range(begin, index)
                begin, options = index, 0
            options += more
        yield range(begin, count)


def _options(task: Task, item: dict[str, Any]) -> int:
    if task.kind == "language_modeling":
        return 1
    return len(item["context_options" if task.kind == "schema" else "choices"])


def count_right(
    engine: Engine,
    encoder: Encoder,
    tasks: Sequence[TaskItems],
    *,
    limit: int | None,
    batch_size: int,
    between: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Scores by task (core.evaluation.task_scores), the same on every rank; losses are per byte, as in the paper.

    The data-parallel ranks share the items, and do as many forward passes as each other: under ZeRO 3, all gather the
    weights of each. Collective over all ranks of the engine.

    Args:
        limit: items per task.
        batch_size: sequences in a forward pass of a model replica.
        between: called by all ranks together between forward passes; may raise, on all of them, to end the evaluation.
    """
    group, scorer, sizes = parallel_state.get_data_parallel_group(), EngineScorer(engine), bytes_per_token(encoder)
    context = engine.recipe.model.sequence_length
    work = [(number, batch) for number, known in enumerate(tasks) for batch in known.batches(limit, batch_size)]
    right = torch.zeros(len(tasks), dtype=torch.int64)
    for begin in range(0, len(work), group.size()):
        between()
        together = work[begin : begin + group.size()]
        number, indices = together[min(group.rank(), len(together) - 1)]  # without one of its own: another's
        known = tasks[number]
        asked = list(questions(known.task, known.items, indices, encoder, context))
        answered = zip(asked, scorer.score(asked), strict=True)
        if group.rank() < len(together):
            right[number] += sum(example(question, scores, sizes, "bytes")["correct"] for question, scores in answered)
    right = right.to(device())
    dist.all_reduce(right, group=group)
    return {
        known.task.label: task_scores(
            known.task, count, len(known.items) if limit is None else min(limit, len(known.items))
        )
        for known, count in zip(tasks, right.tolist(), strict=True)
    }
