"""Token ids of natural text: the standard library of this machine's Python."""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bov_megatron.data.corpus import find_files, make_units
from bov_megatron.data.tokenizer import TextReading, train_tokenizer

EXCLUDED = ("site-packages", "test")
DOCUMENTS_AT_ONCE = 64


def text_ids(vocab_size: int, samples: int, sequence_length: int, max_bytes: int) -> torch.Tensor:
    """Samples in random order from text packed as for training, int64 `[samples, sequence_length]`.

    Args:
        vocab_size: of the byte-level BPE trained on the same text.
        max_bytes: text to read at most, spread evenly over the files.

    Raises DataError if there is too little text for the vocabulary, ValueError if there is for the samples.
    """
    inputs = [sysconfig.get_paths()["stdlib"]]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        encoder = train_tokenizer(
            inputs, Path(folder), vocab_size, max_bytes, invalid_utf8="skip", exclude=EXCLUDED, progress=False
        )
        units = make_units(find_files(inputs, EXCLUDED))
        share = max_bytes / sum(unit.text_bytes for unit in units)
        reading = TextReading(share, text_field="text", invalid_utf8="skip", skip_bad=False)
        texts = (text for unit in units for text in reading.texts(unit, []))
        ids = np.concatenate(list(_packed(encoder, texts)))
    count = len(ids) // sequence_length
    if count < samples:
        raise ValueError(f"the text has {count} samples of {sequence_length} tokens, and {samples} are needed")
    packed = torch.from_numpy(ids[: count * sequence_length].astype(np.int64)).view(count, sequence_length)
    return packed[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:samples]]


def _packed(encoder, texts: Iterator[str]) -> Iterator[np.ndarray]:
    """Ids of each document, after a beginning-of-sequence token."""
    begin, batch = np.array([encoder.bos_token_id]), []
    for text in texts:
        batch.append(text)
        if len(batch) == DOCUMENTS_AT_ONCE:
            yield from (part for ids in encoder.encode(batch) for part in (begin, ids))
            batch = []
    yield from (part for ids in encoder.encode(batch) for part in (begin, ids))
