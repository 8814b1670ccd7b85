"""All scores of a model in one report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.bits_per_byte import read_packed_samples, score_samples
from bov_megatron.evaluation.quiet import quiet_libraries
from bov_megatron.evaluation.target import Target
from bov_megatron.lifecycle.terminal import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
) -> dict:
    """Scores of a model: lm-eval's `tasks`, and bits per byte on the MDS folder `packed`.

    Returns `{"model", "scores": {task: {metric: value}}, "samples": {task: count}, …}`, ready for JSON; the packed
    samples appear as the task `packed`. Other arguments as in `lm_eval_tasks.run_tasks`. Raises EvaluationError.
    """
    if packed is not None and limit is not None and limit != int(limit):
        raise EvaluationError(f"--limit {limit} with --packed: packed samples need a whole number")
    if packed is not None:
        _check_tokenizer(target, Path(packed))
    report: dict = {"model": str(target.folder), "scores": {}, "samples": {}}
    with quiet_libraries():
        model = target.load(device, dtype)
        if tasks:
            from bov_megatron.evaluation.lm_eval_tasks import run_tasks

            report |= run_tasks(
                model, target.tokenizer, tasks, tasks_dir=tasks_dir, limit=limit, num_fewshot=num_fewshot,
                batch_size=batch_size, bos=bos,
            )  # fmt: skip
        if packed is not None:
            score = _score_packed(model, target, packed, None if limit is None else int(limit), batch_size)
            report["scores"]["packed"] = score
            report["samples"]["packed"] = score.pop("samples")
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


def _score_packed(
    model: PreTrainedModel, target: Target, folder: str | Path, limit: int | None, batch_size: int
) -> dict:
    """Bits per byte on the first `limit` samples of an MDS folder, with the totals behind it."""
    from bov_megatron.data.tokenizer import load_bytes_per_token

    samples = list(read_packed_samples(folder, limit))
    total = score_samples(model, samples, load_bytes_per_token(target.tokenizer), batch_size)
    return {
        "bits_per_byte": total.value,
        "nats": total.nats,
        "bytes": total.bytes,
        "tokens": total.tokens,
        "samples": len(samples),
    }
