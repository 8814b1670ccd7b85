"""The tokenizer: training a byte-level BPE, encoding documents, hash, and bytes per token."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bov_megatron.data.corpus import (
    SHOWN_BAD_ROWS,
    Document,
    LineNumbers,
    Unit,
    bad_rows_message,
    find_files,
    make_units,
    read_documents,
)
from bov_megatron.data.files import full_disk_message, whole_folder, why_full, write_atomically
from bov_megatron.data.workers import run_in_workers
from bov_megatron.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

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
PRE_TOKEN_CHARACTERS = 256
"""Longest run of letters, of punctuation or of spaces in one word: text without spaces is one word otherwise, which BPE
needs hours for. Llama 3's tokenizer.py cuts runs at 25,000 characters; SentencePiece drops lines above 4,192 bytes."""
# GPT-4's pattern, but with numbers in groups of at most two digits, which suits small vocabularies, and with runs of
# bounded length.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}{1,256}|\p{N}{1,2}"
    r"| ?(?>[^\s\p{L}\p{N}]{1,256})[\r\n]{0,256}|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s{1,256}"
)
PIECE_CHARACTERS = 1 << 18
"""Longer documents are encoded in pieces of about this length."""
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")
"""Before a single space between letters, or after a single line break between non-space characters."""
WHITE_SPACE = frozenset(map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F,
                                  0x205F, 0x3000)))  # fmt: skip
"""What `\\s` matches in SPLIT_PATTERN."""
LOOK_AHEAD = 4 * PRE_TOKEN_CHARACTERS
"""More than SPLIT_PATTERN sees of the text behind a word's beginning."""


@dataclass(frozen=True)
class Encoder:
    """A byte-level tokenizer."""

    folder: Path
    fast: Tokenizer
    vocab_size: int
    """Highest id + 1."""
    bos_token_id: int
    hash: str
    splitter: PreTokenizer | None
    """That of `train_tokenizer` if this tokenizer uses it; see `split_at_words`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.fast.encode_special_tokens = True  # which its pickle doesn't keep

    @property
    def dtype(self) -> str:
        """`uint16` if it holds every id, else `uint32`."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as 1-D arrays of `dtype`, without `<|bos|>`."""
        # A document can't forge a border: `encode_special_tokens` is set, so text that spells `<|bos|>` is plain text.
        pieces = [split_at_words(text, splitter=self.splitter) for text in texts]
        encoded = self.fast.encode_batch_fast(list(itertools.chain(*pieces)), add_special_tokens=False)
        ids = iter(np.array(encoding.ids, dtype=self.dtype) for encoding in encoded)
        return [np.concatenate(list(itertools.islice(ids, len(parts)))) for parts in pieces]


def split_at_words(text: str, size: int = PIECE_CHARACTERS, splitter: PreTokenizer | None = None) -> list[str]:
    """Cut a text every `size` characters or a little later, so that encoding the pieces gives the ids of the whole.

    Without `splitter` (that of SPLIT_PATTERN), it is cut only where every byte-level tokenizer splits.
    """
    # Encoding takes some hundred bytes of memory per byte of text. CUT matches only where byte-level pre-tokenizers
    # always split; a line break followed by others isn't such a place.
    pieces, begin = [], 0
    while len(text) - begin > size:
        cut = CUT.search(text, begin + size, begin + 2 * size if splitter else len(text))
        stop = cut.start() if cut else _next_split(text, begin, size, splitter) if splitter else None
        if stop is None:
            break
        pieces.append(text[begin:stop])
        begin = stop
    return [*pieces, text[begin:]]


def _next_split(text: str, begin: int, size: int, splitter: PreTokenizer) -> int | None:
    """A place at least `size` characters behind `begin` where SPLIT_PATTERN ends a word, in the text as in a piece that
    ends there; None if there is none near."""
    # Words are matched from left to right, by a pattern that does not look back, so that matching can begin at any
    # word's end. Matches in this window are those in the whole text but for those within LOOK_AHEAD of its end.
    window = text[begin : begin + size + 2 * LOOK_AHEAD]
    for _, (_, end) in splitter.pre_tokenize_str(window):
        if size <= end <= size + LOOK_AHEAD and begin + end < len(text):
            # The last of several spaces is a word of its own before other characters, but not at a text's end.
            spaces = [character in WHITE_SPACE for character in text[begin + end - 1 : begin + end + 1]]
            if spaces != [True, False]:
                return begin + end
    return None


def _splitter() -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")


def _uses_splitter(fast: Tokenizer) -> bool:
    values = json.loads(fast.to_str())
    first, *_ = (values["pre_tokenizer"] or {}).get("pretokenizers") or [None]
    return values["normalizer"] is None and first == json.loads(_splitter().__getstate__())


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
    splitter = _splitter() if _uses_splitter(fast) else None
    encoder = Encoder(Path(folder), fast, vocab_size, bos_id, tokenizer_hash(folder), splitter)
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
    skip_bad: bool = False,
    exclude: Sequence[str] = (),
    progress: bool = True,
    overwrite: bool = False,
) -> Encoder:
    """Train a byte-level BPE and save it as a PreTrainedTokenizerFast, with bytes per token.

    Reads at most `max_bytes` of text, spread evenly over the inputs. `<|bos|>`, id 0, is the eos and pad token too. The
    same inputs give the same tokenizer. Runs in a process of its own, which is killed where this one is interrupted.

    Raises DataError for bad inputs, too little text for `vocab_size`, or a full disk.
    """
    out = Path(out).expanduser()
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size}: a byte-level BPE needs at least 257 (256 bytes and {BOS_TOKEN})")
    if max_bytes < 1:
        raise DataError(f"--max-bytes {max_bytes}: must be at least 1")
    try:
        _raise_unless_free(out, overwrite)
        units = make_units(find_files(inputs, exclude))
        sizes = [unit.text_bytes for unit in units]
        reading = TextReading(max_bytes / max(sum(sizes), 1), text_field, invalid_utf8, skip_bad)
        run = partial(run_in_workers, remedy="run again with a smaller --max-bytes")
        # All of it is read before: a bad row is then found early, and not by the trainer.
        checks = [partial(_check_unit, unit, reading) for unit in units]
        found = run(checks, len(os.sched_getaffinity(0)), label="checking", sizes=sizes, progress=progress)
        if not any(has_text for has_text, _ in found):
            raise DataError("the input holds no text: its files, or all of their documents, are empty")
        bad_rows = [row for _, rows in found for row in rows]
        if bad_rows:
            print(bad_rows_message(len(bad_rows), bad_rows[:SHOWN_BAD_ROWS]), file=sys.stderr)
        train = partial(_train_bpe, units, reading, vocab_size, progress)
        (state,) = run([train], 1, label="training", sizes=[0], progress=False, start_method="spawn")
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from None
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(state)
    size = fast.get_vocab_size(with_added_tokens=True)
    if size < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the text has only {size - 257} pairs worth merging, which gives {size} ids; "
            f"give more text, or --vocab-size {size} or less"
        )
    save_tokenizer(fast, out)
    return load_encoder(out)


def _raise_unless_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder to write to")
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if others := sorted(present - {*TOKENIZER_FILES, BYTES_PER_TOKEN_NAME}):
        raise DataError(f"--out {out} holds {others[0]}, which is no part of a tokenizer; give a folder of its own")
    if present and not overwrite:
        raise DataError(f"--out {out} holds a tokenizer already; pass --overwrite to replace it")


@dataclass(frozen=True)
class TextReading:
    """What is read of units: the beginning of each, `share` of its bytes (all of it from 1 on)."""

    share: float
    text_field: str
    invalid_utf8: str
    skip_bad: bool

    def texts(self, unit: Unit, bad_rows: list[Document]) -> Iterator[str]:
        """Texts of a unit, none of them empty; bad rows are appended to `bad_rows`."""
        left = int(unit.text_bytes * self.share) if self.share < 1 else None
        for segment in unit.segments:
            for document in read_documents(segment, self.text_field, self.invalid_utf8, self.skip_bad):
                if left is not None and left <= 0:
                    return
                if document.problem is not None:
                    bad_rows.append(document)
                data = document.data or b""
                if left is not None:
                    data, left = data[:left], left - len(data)
                if text := data.decode(errors="ignore"):
                    yield text


def _check_unit(unit: Unit, reading: TextReading) -> tuple[bool, list[Document]]:
    """Whether a unit has text, and its bad rows by line. Raises DataError at the first row that is refused."""
    bad_rows: list[Document] = []
    has_text = False
    for _ in reading.texts(unit, bad_rows):
        has_text = True
    lines = LineNumbers()
    return has_text, [Document(None, lines.resolve(row.place), row.problem) for row in bad_rows]


def _train_bpe(units: Sequence[Unit], reading: TextReading, vocab_size: int, progress: bool) -> str:
    """The tokenizer in the form of tokenizer.json.

    For a spawned worker: once begun, training can only be killed, and in a fork of a process that has encoded with
    several threads it would wait for them forever.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Unset, the library uses all cores.
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    splitter = _splitter()
    fast = Tokenizer(models.BPE(byte_fallback=False, unk_token=None, fuse_unk=False))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=progress,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS_TOKEN],
    )
    texts = itertools.chain.from_iterable(reading.texts(unit, []) for unit in units)
    # In pieces, to save memory: the trainer only counts words, and no word is cut.
    pieces = (piece for text in texts for piece in split_at_words(text, splitter=splitter))
    fast.train_from_iterator(pieces, trainer)
    return fast.to_str()


def save_tokenizer(fast: Tokenizer, out: Path, bos_token: str = BOS_TOKEN) -> None:
    """Write a tokenizer's folder, complete or not at all. Raises DataError if it can't be written or isn't
    byte-level."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=bos_token,
        eos_token=bos_token,
        pad_token=bos_token,
        clean_up_tokenization_spaces=False,
    )
    try:
        with whole_folder(out) as folder:
            wrapped.save_pretrained(folder)
            write_atomically(folder / BYTES_PER_TOKEN_NAME, _lengths_json(bytes_per_token(load_encoder(folder))))
    except Exception as error:
        if reason := why_full(error):
            needed = 2 * len(fast.to_str(pretty=True))  # tokenizer.json, and less for the others
            remedy = "free space there, or give another --out, and run again"
            raise DataError(full_disk_message(out, reason, needed, remedy)) from None
        if isinstance(error, OSError):
            raise DataError(f"--out {error.filename or out}: {error.strerror or error}") from None
        raise
