"""Bits per byte of an exported model: on packed held-out samples, and on documents as lm-eval scores them.

The definition is the trainer's (arXiv 2606.02780): the sum of -ln p over all targets that are not special tokens,
divided by ln 2 and by the UTF-8 bytes of those targets. Special tokens count neither nats nor bytes.

Packed samples cut documents anywhere and let a document see the ones before it in the sample; lm-eval gives each
document its own windows. The two therefore differ a little on the same text. To compare like with like,
`write_rolling_task` cuts documents into texts of at most one window each, and returns them twice: as a task for lm-eval
and as samples that a trainer's validation, or `score_samples`, takes as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from bov_megatron.data.tokenizer import Encoder, load_encoder
from bov_megatron.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BitsPerByte:
    """Totals over the targets that are not special tokens."""

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
    """Score samples as the trainer does: inputs `[:-1]`, targets `[1:]`, each sample on its own.

    Args:
        model: an exported model; its device is used.
        samples: token ids, each `[sequence_length + 1]`, all of one length.
        bytes_per_token: `[vocab]`, 0 for special tokens (`bov_megatron.data.tokenizer.load_bytes_per_token`).
    """
    sizes = torch.as_tensor(np.asarray(bytes_per_token, dtype=np.int64)).to(model.device)
    nats, size, tokens = 0.0, 0, 0
    samples = iter(samples)
    while batch := list(islice(samples, batch_size)):
        ids = torch.as_tensor(np.stack(batch).astype(np.int64)).to(model.device)
        highest, vocab_size = int(ids.max()), model.config.vocab_size
        if highest >= min(len(sizes), vocab_size):
            raise EvaluationError(
                f"a sample holds id {highest}, but the model has {vocab_size} ids and the tokenizer {len(sizes)}; "
                "give the data and the tokenizer that the model was trained with"
            )
        logits = model(ids[:, :-1], use_cache=False).logits
        targets = ids[:, 1:].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none").double()
        counted = sizes[targets] > 0
        nats += float(losses[counted].sum())
        size += int(sizes[targets].sum())
        tokens += int(counted.sum())
    if size == 0:
        raise EvaluationError("there is no text to score: no samples, or special tokens alone")
    return BitsPerByte(nats, size, tokens)


def read_packed_samples(folder: str | Path, limit: int | None = None) -> Iterator[np.ndarray]:
    """The packed samples of an MDS folder (such as a prepared data set's `val`), in the order of the shards."""
    from streaming import LocalDataset

    if not (Path(folder) / "index.json").is_file():
        raise EvaluationError(f"{folder} has no index.json; give a folder of MDS shards, such as DATA/val")
    dataset = LocalDataset(str(folder))
    for index in range(len(dataset) if limit is None else min(limit, len(dataset))):
        yield dataset[index]["tokens"]


@dataclass(frozen=True)
class RollingTask:
    """A local lm-eval task, and the same windows as samples."""

    name: str
    tasks_dir: Path
    """Pass as `--tasks-dir`."""
    samples: np.ndarray
    """`[windows, sequence_length + 1]`: the first special token, the text's tokens, padding of that special token,
    which as a target counts nothing."""
    skipped: int
    """Documents left out because they spell a special token, which lm-eval would read as that token."""


def write_rolling_task(
    documents: Iterable[str],
    tokenizer_dir: str | Path,
    sequence_length: int,
    out_dir: str | Path,
    name: str = "held_out",
    max_windows: int | None = None,
) -> RollingTask:
    """Write a `loglikelihood_rolling` task over `documents` whose every window is one sample of the trainer's form.

    lm-eval scores a text of at most `sequence_length` tokens in one window, with `<|bos|>` before it. Documents are cut
    at line ends into such texts, so its `bits_per_byte` equals that of `samples` up to rounding.

    Writes `out_dir/<name>.yaml` and `out_dir/<name>.jsonl`; returns the samples too. At most `max_windows` are made.
    """
    encoder = load_encoder(tokenizer_dir)
    special = [token.content for token in encoder.fast.get_added_tokens_decoder().values() if token.special]
    texts, ids, skipped = [], [], 0
    for document in documents:
        if any(token in document for token in special):
            skipped += 1
            continue
        for text, tokens in _cut(document, _encoder_function(encoder), sequence_length):
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


def _encoder_function(encoder: Encoder) -> Callable[[list[str]], list[np.ndarray]]:
    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids) for e in encoder.fast.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _cut(document: str, encode: Callable[[list[str]], list[np.ndarray]], most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Texts that together are the document, with their tokens: at most `most` each, cut at line ends if possible."""
    pieces = _short_lines(document.splitlines(keepends=True), encode, most)
    begin = 0
    while begin < len(pieces):
        end, total = begin, 0
        while end < len(pieces) and total + pieces[end][1] <= most:
            total += pieces[end][1]
            end += 1
        # Tokens may join across lines, so count the joined text; one line always fits.
        while True:
            text = "".join(line for line, _ in pieces[begin:end])
            (tokens,) = encode([text])
            if len(tokens) <= most:
                break
            end -= 1
        yield text, tokens
        begin = end


def _short_lines(lines: list[str], encode: Callable[[list[str]], list[np.ndarray]], most: int) -> list[tuple[str, int]]:
    """Lines with their token counts; a line of more than `most` tokens is halved until it fits."""
    short = []
    for line, tokens in zip(lines, encode(lines), strict=True):
        if len(tokens) <= most:
            short.append((line, len(tokens)))
        elif len(line) == 1:
            raise EvaluationError(f"sequence_length={most} is less than one character needs ({line!r})")
        else:
            middle = len(line) // 2
            short += _short_lines([line[:middle], line[middle:]], encode, most)
    return short
