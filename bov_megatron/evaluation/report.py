"""All scores of a model in one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from bov_megatron.data.tokenizer import load_bytes_per_token
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.bits_per_byte import read_packed_samples, score_samples, score_samples_on_engine
from bov_megatron.evaluation.layout import Layout, open_engine
from bov_megatron.evaluation.quiet import quiet_libraries
from bov_megatron.evaluation.target import Target
from bov_megatron.lifecycle.terminal import warn


def evaluate(
    target: Target,
    *,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    packed: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "auto",
    bos: bool = True,
    layout: Layout | None = None,
    bank_device: str | None = None,
) -> dict:
    """Scores of a model: lm-eval's `tasks`, and bits per byte on the MDS folder `packed`.

    Args:
        layout: of the processes that all call this; those that aren't the first get no scores of tasks.
        bank_device: as in `Target.load`.

    Returns `{"model", "scores": {task: {metric: value}}, "samples": {task: count}, …}`, ready for JSON; the packed
    samples appear as the task `packed`. Other arguments as in lm_eval_tasks. Raises EvaluationError.
    """
    if packed is not None and limit is not None and limit != int(limit):
        raise EvaluationError(f"--limit {limit} with --packed: packed samples need a whole number")
    if packed is not None:
        _check_tokenizer(target, Path(packed))
    report: dict = {"model": str(target.folder), "scores": {}, "samples": {}}
    shared = open_engine(target, layout, dtype, bank_device) if layout and layout.world.world_size > 1 else None
    with quiet_libraries(), shared or nullcontext() as engine:
        model = None if engine else target.load(device, dtype, bank_device)
        if tasks:
            from bov_megatron.evaluation.lm_eval_tasks import as_lm_eval_model, load_tasks

            if engine:
                from bov_megatron.evaluation.lm_eval_engine import EngineLM

                lm = EngineLM(engine, target.encoder(), batch_size, bos)
            else:
                lm = as_lm_eval_model(model, target.tokenizer, batch_size=batch_size, bos=bos)
            report |= load_tasks(tasks, tasks_dir).run(lm, limit, num_fewshot)
        if packed is not None:
            samples = list(read_packed_samples(packed, None if limit is None else int(limit)))
            sizes = load_bytes_per_token(target.tokenizer)
            if engine:
                total = score_samples_on_engine(engine, samples, sizes, batch_size)
            else:
                total = score_samples(model, samples, sizes, batch_size)
            report["scores"]["packed"] = {"bits_per_byte": total.value, **dataclasses.asdict(total)}
            report["samples"]["packed"] = len(samples)
    return report


def _check_tokenizer(target: Target, packed: Path) -> None:
    """Raise EvaluationError where the packed samples were made with another tokenizer than the model's."""
    from bov_megatron.data.manifest import MANIFEST_NAME, read_manifest

    data_set = packed.resolve().parent
    if not (packed / "index.json").is_file():
        return  # read_packed_samples says so
    if not (data_set / MANIFEST_NAME).is_file():
        warn(f"--packed {packed}: no {MANIFEST_NAME} beside it, so its tokenizer is not known to be the model's")
        return
    made_with, own = read_manifest(data_set).tokenizer_hash, target.encoder().hash
    if made_with != own:
        raise EvaluationError(
            f"--packed {packed} was made with tokenizer {made_with[:12]}, the model with {own[:12]}: its ids stand for "
            "other text; prepare the data again with --tokenizer set to the model's folder"
        )
