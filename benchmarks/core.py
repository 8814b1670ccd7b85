"""CORE's examples per second: batches against one example per forward pass, of an exported model and of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import Spread, speed_ratio, take_turns
from benchmarks.training_step import one_process
from bov_megatron.evaluation.core.bundle import Task
from bov_megatron.evaluation.core.evaluation import batches
from bov_megatron.evaluation.core.prompts import Option, Question
from bov_megatron.evaluation.core.scorers import EngineScorer, TransformersScorer
from bov_megatron.parallel.device import device
from bov_megatron.recipe import Recipe, recipe_from_dict

KINDS = {
    # label: tokens of what the options share, options, tokens of each
    "multiple choice, 10 shots": (700, 4, 24),
    "multiple choice, 0 shots": (24, 2, 10),
    "schema, 5 shots": (150, 2, 28),
    "language modelling, 0 shots": (90, 1, 3),
}
"""About as long as HellaSwag's, COPA's, Winogrande's and LAMBADA's examples."""
EXAMPLES, QUICK_EXAMPLES = 8, 2
BATCH_SIZE = 32
VOCABULARY = 8192


WIDTHS = (128, 256)
"""Of the smoke recipe, and one that keeps two CPU cores busy with an example alone."""


def bench_core(turns: int, quick: bool) -> dict:
    """Random models of six layers and random tokens, `EXAMPLES` of each kind; by width."""
    return {f"width {width}": _bench_model(width, turns, quick) for width in WIDTHS[: 1 if quick else None]}


def _bench_model(width: int, turns: int, quick: bool) -> dict:
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.exchange.export import hf_config
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    recipe = _recipe(width)
    torch.manual_seed(0)
    export = TransformersScorer(BovForCausalLM(hf_config(recipe.model)).to(device()))
    examples = QUICK_EXAMPLES if quick else EXAMPLES
    found = {}
    with one_process(recipe):
        engine = EngineScorer(MegatronEngine(recipe, with_optimizer=False))
        for label, lengths in {**KINDS, "all": None}.items():
            chosen = KINDS.values() if lengths is None else [lengths]
            by_kind = [[_question(index, *sizes) for index in range(examples)] for sizes in chosen]
            asked = [question for of_kind in by_kind for question in of_kind]
            together = [batch for of_kind in by_kind for batch in batches(of_kind, BATCH_SIZE)]
            timings = take_turns(
                {
                    "batches": lambda turn, asked=together: [export.score(batch) for batch in asked],
                    "one by one": lambda turn, asked=asked: _one_by_one(export.model, asked),
                    "engine, batches": lambda turn, asked=together: [engine.score(batch) for batch in asked],
                    "engine, one by one": lambda turn, asked=asked: [engine.options(q.options, 1) for q in asked],
                },
                turns,
            )
            found[label] = {
                name: {"examples_per_second": Spread.of([len(asked) / seconds for seconds in timing.wall])}
                for name, timing in timings.items()
            } | {
                "batches_over_one_by_one": speed_ratio(timings, "batches", "one by one"),
                "the_same_of_the_engine": speed_ratio(timings, "engine, batches", "engine, one by one"),
            }
    return found


def _recipe(width: int) -> Recipe:
    model = {
        "num_layers": 6, "hidden_size": width, "num_attention_heads": 4, "vocab_size": VOCABULARY,
        "sequence_length": 1024,
    }  # fmt: skip
    train = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "precision": "fp32"}
    return recipe_from_dict({"name": "core", "model": model, "train": train, "data": {"path": "unused"}})


@torch.no_grad()
def _one_by_one(model, asked: Sequence[Question]) -> None:
    """An example's options in one forward pass, whole, with all logits, as nanochat's core_eval does it."""
    for question in asked:
        ids = torch.tensor([option.ids for option in question.options], device=model.device)
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        logits.argmax(-1)


def _question(index: int, shared: int, options: int, added: int) -> Question:
    chance = torch.Generator().manual_seed(index)
    prefix = torch.randint(VOCABULARY, (shared,), generator=chance).tolist()
    made = [
        Option(prefix + torch.randint(VOCABULARY, (added,), generator=chance).tolist(), shared) for _ in range(options)
    ]
    task = Task("benchmark", "multiple_choice", Path(), 0, " ", 0.0)
    return Question(task, index, made, 0)
