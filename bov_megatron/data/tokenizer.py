"""The tokenizer: training a byte-level BPE, encoding documents, hash, and bytes per token."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bov_megatron.data.corpus import Unit, find_files, make_units, read_documents
from bov_megatron.data.files import write_atomically
from bov_megatron.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS_TOKEN = "<|bos|>"
BYTES_PER_TOKEN_NAME = "bytes_per_token.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# GPT-4's pattern, but with numbers in groups of at most two digits, which suits small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
PIECE_CHARACTERS = 1 << 18
"""Longer documents are encoded in pieces of about this length."""
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")
"""Before a single space between letters, or after a single line break between non-space characters."""


@dataclass(frozen=True)
class Encoder:
    """A byte-level tokenizer."""

    folder: Path
    fast: Tokenizer
    vocab_size: int
    """Highest id + 1."""
    bos_token_id: int
    hash: str

    @property
    def dtype(self) -> str:
        """`uint16` if it holds every id, else `uint32`."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as 1-D arrays of `dtype`, without `<|bos|>`."""
        # A document can't forge a border: `encode_special_tokens` is set, so text that spells `<|bos|>` is plain text.
        pieces = [split_at_words(text) for text in texts]
        encoded = self.fast.encode_batch_fast(list(itertools.chain(*pieces)), add_special_tokens=False)
        ids = iter(np.array(encoding.ids, dtype=self.dtype) for encoding in encoded)
        return [np.concatenate(list(itertools.islice(ids, len(parts)))) for parts in pieces]


def split_at_words(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Cut a text every `size` characters or a little later, so that encoding the pieces gives the ids of the whole."""
    # Encoding takes some hundred bytes of memory per byte of text. CUT matches only where byte-level pre-tokenizers
    # always split; a line break followed by others isn't such a place.
    pieces, begin = [], 0
    while len(text) - begin > size and (cut := CUT.search(text, begin + size)):
        pieces.append(text[begin : cut.start()])
        begin = cut.start()
    return [*pieces, text[begin:]]


def load_encoder(folder: str | Path) -> Encoder:
    """Open a tokenizer folder in Hugging Face's format (tokenizer.json); cached per process.

    Raises DataError if it isn't one, has neither bos nor eos token, or isn't byte-level.
    """
    path = Path(folder).expanduser() / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"--tokenizer {folder}: no tokenizer.json there; train one with `bov train-tokenizer`")
    return _load_encoder(str(path.parent), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _load_encoder(folder: str, _modified: int) -> Encoder:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    try:
        fast = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a valid tokenizer: {error}") from None
    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = True
    bos = _special_token(Path(folder), "bos_token") or _special_token(Path(folder), "eos_token")
    bos_id = fast.token_to_id(bos) if bos else None
    if bos_id is None:
        raise DataError(f"{folder}: the tokenizer has no bos_token or eos_token to separate documents with")
    vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
    encoder = Encoder(Path(folder), fast, vocab_size, bos_id, tokenizer_hash(folder))
    bytes_per_token(encoder)  # raises if it isn't byte-level
    return encoder


def _special_token(folder: Path, name: str) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = json.loads((folder / file).read_bytes()).get(name)
            if token:
                return token["content"] if isinstance(token, dict) else token
    return None


def tokenizer_hash(folder: str | Path) -> str:
    """SHA-256 of what determines the ids in tokenizer.json: not formatting, padding or truncation settings."""
    values = json.loads((Path(folder) / "tokenizer.json").read_bytes())
    for key in ("version", "padding", "truncation", "post_processor"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def bytes_per_token(encoder: Encoder) -> np.ndarray:
    """UTF-8 bytes of every id, int64 `[vocab_size]`; 0 for special tokens and unused ids.

    Raises DataError for a token that isn't byte-level.
    """
    # Each character of a byte-level token stands for one byte. Decoding single ids would miscount: an id that is part
    # of a character decodes to U+FFFD, three bytes.
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    added = encoder.fast.get_added_tokens_decoder()
    lengths = np.zeros(encoder.vocab_size, dtype=np.int64)
    for token, index in encoder.fast.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(added[index].content.encode())
        elif alphabet.issuperset(token):
            lengths[index] = len(token)
        else:
            raise DataError(
                f"{encoder.folder}: token {token!r} (id {index}) is not byte-level, so its bytes can't be counted; "
                "use a byte-level BPE, e.g. from `bov train-tokenizer`"
            )
    return lengths


def load_bytes_per_token(folder: str | Path) -> np.ndarray:
    """`bytes_per_token` of a tokenizer folder, from its `bytes_per_token.json` if there is one."""
    path = Path(folder) / BYTES_PER_TOKEN_NAME
    if not path.is_file():
        return bytes_per_token(load_encoder(folder))
    return np.array(json.loads(path.read_bytes()), dtype=np.int64)


def copy_tokenizer(encoder: Encoder, out: Path) -> list[str]:
    """Copy the tokenizer's files and bytes per token to `out`; returns their names."""
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in TOKENIZER_FILES if (encoder.folder / name).is_file()]
    for name in names:
        shutil.copyfile(encoder.folder / name, out / name)
    write_atomically(out / BYTES_PER_TOKEN_NAME, _lengths_json(bytes_per_token(encoder)))
    return [*names, BYTES_PER_TOKEN_NAME]


def _lengths_json(lengths: np.ndarray) -> bytes:
    return (json.dumps(lengths.tolist(), separators=(",", ":")) + "\n").encode()


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    vocab_size: int = 32768,
    max_bytes: int = 2_000_000_000,
    text_field: str = "text",
    invalid_utf8: str = "error",
    exclude: Sequence[str] = (),
    progress: bool = True,
    overwrite: bool = False,
) -> Encoder:
    """Train a byte-level BPE and save it as a PreTrainedTokenizerFast, with bytes per token.

    Reads at most `max_bytes` of text, spread evenly over the inputs. `<|bos|>`, id 0, is the eos and pad token too. The
    same inputs give the same tokenizer. Raises DataError for bad inputs or too little text for `vocab_size`.
    """
    out = Path(out).expanduser()
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size}: a byte-level BPE needs at least 257 (256 bytes and {BOS_TOKEN})")
    if (out / "tokenizer.json").exists() and not overwrite:
        raise DataError(f"--out {out} holds a tokenizer already; pass --overwrite to replace it")
    units = make_units(find_files(inputs, exclude))
    texts = training_texts(units, max_bytes, text_field, invalid_utf8)
    # In pieces, to save memory: the trainer only counts words, and no word is cut.
    pieces = (piece for text in texts for piece in split_at_words(text))
    fast = _train_bpe(pieces, vocab_size, progress)
    size = fast.get_vocab_size(with_added_tokens=True)
    if size < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the text has only {size - 257} pairs worth merging, which gives {size} ids; "
            f"give more text, or --vocab-size {size} or less"
        )
    _save(fast, out)
    encoder = load_encoder(out)
    write_atomically(out / BYTES_PER_TOKEN_NAME, _lengths_json(bytes_per_token(encoder)))
    return encoder


def training_texts(units: Sequence[Unit], max_bytes: int, text_field: str, invalid_utf8: str) -> Iterator[str]:
    """The beginning of every unit's text, in proportion to its size and `max_bytes` in all."""
    total = sum(unit.text_bytes for unit in units)
    share = min(1.0, max_bytes / max(total, 1))
    empty = True
    for unit in units:
        left = int(unit.text_bytes * share) if share < 1 else None
        for segment in unit.segments:
            for document in read_documents(segment, text_field, invalid_utf8):
                if left is not None and left <= 0:
                    break
                data = document.data or b""
                if left is not None:
                    data, left = data[:left], left - len(data)
                if data:
                    empty = False
                    yield data.decode(errors="ignore")
    if empty:
        raise DataError("the input holds no text: its files, or all of their documents, are empty")


def _train_bpe(texts: Iterator[str], vocab_size: int, progress: bool):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    # Without it, training may use one thread only, e.g. after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    fast = Tokenizer(models.BPE(byte_fallback=False, unk_token=None, fuse_unk=False))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=progress,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS_TOKEN],
    )
    fast.train_from_iterator(texts, trainer)
    return fast


def _save(fast, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=BOS_TOKEN,
        eos_token=BOS_TOKEN,
        pad_token=BOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(out)
