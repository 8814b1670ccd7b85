"""Bits per byte of an exported model, on packed held-out samples or as lm-eval scores documents.

As in training (arXiv 2606.02780): the sum of -ln p over all targets that aren't special tokens, divided by ln 2 and by
the UTF-8 bytes of those targets.

Packed samples cut documents anywhere, and a document sees those before it; lm-eval gives each document its own windows.
So the two differ a little on the same text. To compare exactly, `write_rolling_task` cuts documents into texts of at
most one window, writes them as an lm-eval task, and returns them as samples.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from bov_megatron.data.tokenizer import load_encoder
from bov_megatron.errors import EvaluationError
from bov_megatron.parallel.device import device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bov_megatron.data.loader import ValidationBatch
    from bov_megatron.engines.base import Engine, ScoreResult

HELD_OUT_CHUNK = 16
"""Micro-batches per call of the engine: enough to fill a pipeline."""


@dataclass(frozen=True)
class BitsPerByte:
    """Totals over targets that aren't special tokens."""

    nats: float
    bytes: int
    tokens: int

    @property
    def value(self) -> float:
        """Bits per byte."""
        return self.nats / (math.log(2) * self.bytes)


@torch.no_grad()
def score_samples(
    model: PreTrainedModel, samples: Iterable[np.ndarray], bytes_per_token: np.ndarray, batch_size: int = 8
) -> BitsPerByte:
    """Score samples as in training: inputs `[:-1]`, targets `[1:]`.

    Args:
        model: an exported model, on the device to use.
        samples: token ids, each `[sequence_length + 1]`.
        bytes_per_token: `[vocab]`, 0 for special tokens (`bov_megatron.data.tokenizer.load_bytes_per_token`).

    Raises EvaluationError for ids outside the vocabulary, or if there is nothing to score.
    """
    sizes = torch.as_tensor(np.asarray(bytes_per_token, dtype=np.int64)).to(model.device)
    nats, size, tokens = 0.0, 0, 0
    samples = iter(samples)
    while batch := list(itertools.islice(samples, batch_size)):
        ids = torch.as_tensor(np.stack(batch).astype(np.int64)).to(model.device)
        highest, vocab_size = int(ids.max()), model.config.vocab_size
        if highest >= min(len(sizes), vocab_size):
            raise EvaluationError(
                f"a sample holds id {highest}, but the model has {vocab_size} ids and the tokenizer {len(sizes)}; "
                "use the data and the tokenizer that the model was trained with"
            )
        logits = model(ids[:, :-1], use_cache=False).logits
        targets = ids[:, 1:].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none").double()
        counted = sizes[targets] > 0
        nats += float(losses[counted].sum())
        size += int(sizes[targets].sum())
        tokens += int(counted.sum())
    if size == 0:
        raise EvaluationError("there is no text to score: no samples, or only special tokens")
    return BitsPerByte(nats, size, tokens)


def score_held_out(
    engine: Engine,
    loader: Iterable[ValidationBatch],
    bytes_per_token: torch.Tensor,
    must_stop: Callable[[], bool] = lambda: False,
) -> ScoreResult | None:
    """The same of a data set's held-out split, on a model in any layout; collective over all ranks of the engine.

    Args:
        loader: this data-parallel rank's micro-batches; every rank has equally many.
        bytes_per_token: on the device.
        must_stop: asked by all ranks together between chunks; the answer is the same on all.

    Returns the same on every rank: None where it was stopped.
    """
    from bov_megatron.engines.base import ScoreResult

    sums = torch.zeros(3, dtype=torch.float64, device=device())
    batches = iter(loader)
    while chunk := list(itertools.islice(batches, HELD_OUT_CHUNK)):
        if must_stop():
            return None
        sums += engine.score_sums([batch.tokens for batch in chunk], bytes_per_token, [batch.mask for batch in chunk])
    return ScoreResult.of(sums)


def score_samples_on_engine(
    engine: Engine, samples: Sequence[np.ndarray], bytes_per_token: np.ndarray, batch_size: int = 8
) -> BitsPerByte:
    """The same on an engine, whose data-parallel ranks share the samples; collective over all its ranks."""
    from megatron.core import parallel_state

    if not samples:
        raise EvaluationError("there is no text to score: no samples")
    group = parallel_state.get_data_parallel_group()
    rounds = -(-len(samples) // (batch_size * group.size()))
    batches, counted = [], []
    for number in range(rounds):
        begin = (number * group.size() + group.rank()) * batch_size
        own = list(samples[begin : begin + batch_size])
        counted.append(torch.arange(batch_size) < len(own))
        batches.append(torch.as_tensor(np.stack([*own, *[samples[0]] * (batch_size - len(own))]).astype(np.int64)))
    total = engine.score(batches, torch.as_tensor(np.asarray(bytes_per_token, np.int64)).to(device()), counted)
    return BitsPerByte(total.nats, total.bytes, total.tokens)


def read_packed_samples(folder: str | Path, limit: int | None = None) -> Iterator[np.ndarray]:
    """Samples of an MDS folder (such as a prepared data set's `val`), in stored order."""
    from streaming import LocalDataset

    if not (Path(folder) / "index.json").is_file():
        raise EvaluationError(f"{folder} has no index.json; give a folder of MDS shards, such as DATA/val")
    dataset = LocalDataset(str(folder))
    for index in range(len(dataset) if limit is None else min(limit, len(dataset))):
        yield dataset[index]["tokens"]


@dataclass(frozen=True)
class RollingTask:
    """A local lm-eval task and the same windows as samples."""

    name: str
    tasks_dir: Path
    """For `--tasks-dir`."""
    samples: np.ndarray
    """`[windows, sequence_length + 1]`: `<|bos|>`, the text's tokens, padding with `<|bos|>`, which isn't counted."""
    skipped: int
    """Number of documents left out because they spell a special token, which lm-eval would encode as that token."""


def write_rolling_task(
    documents: Iterable[str],
    tokenizer_dir: str | Path,
    sequence_length: int,
    out_dir: str | Path,
    name: str = "held_out",
    max_windows: int | None = None,
) -> RollingTask:
    """Write a `loglikelihood_rolling` task over `documents`, as `out_dir/<name>.yaml` and `out_dir/<name>.jsonl`.

    lm-eval scores a text of up to `sequence_length` tokens in one window, after `<|bos|>`. Documents are cut into such
    texts, at most `max_windows`, so lm-eval's `bits_per_byte` equals that of the returned samples up to rounding.
    """
    encoder = load_encoder(tokenizer_dir)
    special = [token.content for token in encoder.fast.get_added_tokens_decoder().values() if token.special]

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids) for e in encoder.fast.encode_batch_fast(texts, add_special_tokens=False)]

    texts, ids, skipped = [], [], 0
    for document in documents:
        if any(token in document for token in special):
            skipped += 1
            continue
        for text, tokens in _cut(document, encode, sequence_length):
            texts.append(text)
            ids.append(tokens)
        if max_windows is not None and len(texts) >= max_windows:
            texts, ids = texts[:max_windows], ids[:max_windows]
            break
    if not texts:
        raise EvaluationError(f"no document can be scored: {skipped} spell a special token, the rest is empty")
    samples = np.full((len(ids), sequence_length + 1), encoder.bos_token_id, dtype=np.int64)
    for row, tokens in zip(samples, ids, strict=True):
        row[1 : 1 + len(tokens)] = tokens
    out_dir = Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    data = out_dir / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    }
    (out_dir / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return RollingTask(name, out_dir, samples, skipped)


def _cut(document: str, encode: Callable[[list[str]], list[np.ndarray]], most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Cut a document into texts of at most `most` tokens, at line ends if possible; yields them with their tokens."""
    pieces = _short_lines(document.splitlines(keepends=True), encode, most)
    begin = 0
    while begin < len(pieces):
        end, total = begin, 0
        while end < len(pieces) and total + pieces[end][1] <= most:
            total += pieces[end][1]
            end += 1
        # Tokens may merge across lines, so count those of the joined text; a single line always fits.
        while True:
            text = "".join(line for line, _ in pieces[begin:end])
            (tokens,) = encode([text])
            if len(tokens) <= most:
                break
            end -= 1
        yield text, tokens
        begin = end


def _short_lines(lines: list[str], encode: Callable[[list[str]], list[np.ndarray]], most: int) -> list[tuple[str, int]]:
    """Lines with their token counts; longer ones than `most` tokens are halved until they fit."""
    short = []
    for line, tokens in zip(lines, encode(lines), strict=True):
        if len(tokens) <= most:
            short.append((line, len(tokens)))
        elif len(line) == 1:
            raise EvaluationError(f"sequence_length={most} is too short for the character {line!r}")
        else:
            middle = len(line) // 2
            short += _short_lines([line[:middle], line[middle:]], encode, most)
    return short
