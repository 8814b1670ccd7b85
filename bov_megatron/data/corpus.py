"""Raw text in files: finding the files, cutting them into units of work, reading documents.

A *segment* is a whole file or a part of one that can be read on its own (a byte range of JSON lines, row groups of
Parquet). A *unit* is a run of segments that one worker turns into shards. Both depend on the inputs alone, so the data
set does not depend on how many workers there are.
"""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bov_megatron.errors import DataError

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".yaml",
    ".yml", ".toml", ".ini", ".cfg", ".sql", ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp",
    ".cu", ".cuh", ".java", ".js", ".ts", ".jsx", ".tsx", ".go", ".rs", ".rb", ".pl", ".php", ".sh", ".scala",
    ".kt", ".swift", ".m", ".r", ".jl", ".lua", ".hs", ".ml", ".lean", ".css", ".cmake",
})
# fmt: on
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
COMPRESSED_RATIO = 4
"""Assumed bytes of text per compressed byte, used only to size units."""
INVALID_UTF8_POLICIES = ("error", "replace", "skip")
MIB = 1 << 20


@dataclass(frozen=True)
class Segment:
    """A part of one input file. `begin` and `end` are bytes for `jsonl`, row groups for `parquet`, else unused."""

    path: str
    kind: str
    """`text`, `jsonl`, `jsonl_compressed` or `parquet`."""
    begin: int
    end: int
    text_bytes: int
    """Estimate of its text, for sizing units and for progress."""


@dataclass(frozen=True)
class Unit:
    """Work for one worker at a time; `split` is `val` for inputs given as held-out, else empty."""

    segments: tuple[Segment, ...]
    split: str = ""

    @property
    def text_bytes(self) -> int:
        return sum(segment.text_bytes for segment in self.segments)


@dataclass(frozen=True)
class Document:
    """One document: its text in UTF-8. `data` is None where it wasn't valid and the policy is `skip`."""

    data: bytes | None
    where: str


def find_files(inputs: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files named by paths, folders (searched recursively for known suffixes) and glob patterns, in that order.

    A folder's files come sorted by path; hidden and `__pycache__` entries are left out, and so is what `exclude`
    matches: patterns for the name of a file or folder below the input folder. A file named twice counts once.
    Raises DataError where an input matches nothing.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = _files_in(path, exclude)
            if not files:
                raise DataError(f"input folder {text} holds no file of a known kind ({_known_suffixes()})")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
            if not files:
                raise DataError(f"input {text} does not exist, and no file matches it as a pattern")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError("no input given; name files, folders or glob patterns")
    return list(found.values())


def _files_in(folder: Path, exclude: Sequence[str]) -> list[Path]:
    patterns = [".*", "__pycache__", *exclude]
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if _is_known(path) and not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns):
            files.append(path)
    return [path for path in files if path.is_file()]


def _is_known(path: Path) -> bool:
    """Whether a file found in a folder is read: by its suffix, and below a compression's by the one before.

    Plain .json files there are seldom JSON lines, so they are read only where named explicitly or by a pattern.
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower() in JSONL_SUFFIXES
    return suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES - {".json"} or suffix == ".parquet"


def _known_suffixes() -> str:
    return "text such as .txt .md .rst .py; .jsonl, also .gz .bz2 .xz .zst; .parquet"


def kind_of(path: Path) -> str:
    """How a file is read, by its name. What isn't known is text: only files named explicitly come to that."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix.lower()
        if inner not in JSONL_SUFFIXES:
            raise DataError(f"{path}: only JSON lines may be compressed (.jsonl{suffix}); unpack this file first")
        return "jsonl_compressed"
    return "text"


def make_units(files: Sequence[Path], unit_bytes: int | None = None, split: str = "") -> list[Unit]:
    """Cut files into units of about `unit_bytes` of text; by default a 64th of the whole, from 1 to 128 MiB."""
    total = sum(_text_bytes(path) for path in files)
    if unit_bytes is None:
        unit_bytes = min(max(total // 64, MIB), 128 * MIB)
    units: list[Unit] = []
    waiting: list[Segment] = []
    waiting_bytes = 0
    for segment in (segment for path in files for segment in _segments(path, unit_bytes)):
        waiting.append(segment)
        waiting_bytes += segment.text_bytes
        if waiting_bytes >= unit_bytes:
            units.append(Unit(tuple(waiting), split))
            waiting, waiting_bytes = [], 0
    if waiting:
        units.append(Unit(tuple(waiting), split))
    return units


def _text_bytes(path: Path) -> int:
    return path.stat().st_size * (COMPRESSED_RATIO if kind_of(path) in ("jsonl_compressed", "parquet") else 1)


def _segments(path: Path, unit_bytes: int) -> Iterator[Segment]:
    kind, size = kind_of(path), path.stat().st_size
    if kind == "jsonl":
        for begin in range(0, size, unit_bytes):
            end = min(begin + unit_bytes, size)
            yield Segment(str(path), kind, begin, end, end - begin)
    elif kind == "parquet":
        yield from _parquet_segments(path, unit_bytes)
    else:
        yield Segment(str(path), kind, 0, 0, _text_bytes(path))


def _parquet_segments(path: Path, unit_bytes: int) -> Iterator[Segment]:
    metadata = _open_parquet(path).metadata
    begin, waiting = 0, 0
    for group in range(metadata.num_row_groups):
        waiting += metadata.row_group(group).total_byte_size
        if waiting >= unit_bytes or group == metadata.num_row_groups - 1:
            yield Segment(str(path), "parquet", begin, group + 1, waiting)
            begin, waiting = group + 1, 0


def read_documents(segment: Segment, text_field: str, invalid_utf8: str = "error") -> Iterator[Document]:
    """The documents of a segment, in order.

    `text_field` is the field of JSON lines and the column of Parquet. `invalid_utf8` says what happens to text that is
    not valid UTF-8: `error`, `replace` (U+FFFD) or `skip` (the document comes with `data` None, to be counted).
    """
    path = Path(segment.path)
    if segment.kind == "text":
        pairs = _text_file(path)
    elif segment.kind == "parquet":
        pairs = _parquet_rows(path, segment, text_field)
    else:
        pairs = _json_fields(path, segment, text_field)
    for raw, where in pairs:
        yield Document(_valid_utf8(raw, where, invalid_utf8), where)


def _valid_utf8(raw: bytes | str, where: str, policy: str) -> bytes | None:
    try:
        if isinstance(raw, str):
            return raw.encode()
        raw.decode()
        return raw
    except UnicodeError as error:
        if policy == "error":
            found = f"{error.reason} at {'byte' if isinstance(raw, bytes) else 'character'} {error.start}"
            raise DataError(
                f"{where}: not valid UTF-8 ({found}); convert it, or pass --invalid-utf8 replace or skip"
            ) from None
        if policy == "skip":
            return None
        if isinstance(raw, bytes):
            return raw.decode(errors="replace").encode()
        # A lone surrogate, which JSON can spell: the reader's replacement character, not the encoder's "?".
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in raw).encode()


def _text_file(path: Path) -> Iterator[tuple[bytes, str]]:
    yield path.read_bytes(), str(path)


def _open_parquet(path: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _parquet_rows(path: Path, segment: Segment, column: str) -> Iterator[tuple[str, str]]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{path}: no column '{column}'; it has {', '.join(names)}; choose one with --text-field")
    for group in range(segment.begin, segment.end):
        for row, value in enumerate(file.read_row_group(group, columns=[column]).column(0).to_pylist()):
            where = f"{path}, row {row} of row group {group}"
            if not isinstance(value, str):
                raise DataError(f"{where}: column '{column}' holds {type(value).__name__}, expected text")
            yield value, where


def _json_fields(path: Path, segment: Segment, field: str) -> Iterator[tuple[str, str]]:
    if segment.kind == "jsonl":
        with open(path, "rb") as file:
            for offset, line in _lines_from(file, segment.begin, segment.end):
                yield from _json_field(line, path, field, offset, None)
        return
    number = 0
    try:
        with _open_compressed(path) as file:
            for number, line in enumerate(file, 1):
                yield from _json_field(line, path, field, 0, number)
    except DataError:
        raise
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be unpacked after line {number}: {error}; is the file complete?") from None


def _lines_from(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Lines that start in [begin, end), whole: each line of a file belongs to exactly one range."""
    if begin:
        file.seek(begin - 1)
        file.readline()
    offset = file.tell()
    while offset < end:
        line = file.readline()
        yield offset, line
        offset += len(line)


def _open_compressed(path: Path) -> BinaryIO:
    compression = COMPRESSIONS[path.suffix.lower()]
    if compression == "xz":
        import lzma

        return lzma.open(path, "rb")
    if compression == "bz2":
        import bz2

        return bz2.open(path, "rb")
    if compression == "gzip":
        import gzip

        return gzip.open(path, "rb")
    import io

    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), MIB)


def _json_field(line: bytes, path: Path, field: str, offset: int, number: int | None) -> Iterator[tuple[str, str]]:
    if not line.strip():
        return
    try:
        value = json.loads(line)
        problem = None
    except UnicodeDecodeError:
        # Not text at all to the JSON reader; give the policy for invalid UTF-8 its say.
        value = json.loads(line.decode(errors="surrogateescape"))
        problem = None
    except json.JSONDecodeError as error:
        value, problem = None, f"not valid JSON ({error.msg} at column {error.colno}); each line must be one object"
    if problem is None and not isinstance(value, dict):
        problem = f"expected an object, found {type(value).__name__}; each line must be one object"
    if problem is None and field not in value:
        has = ", ".join(map(str, value)) or "no fields"
        problem = f"no field '{field}'; it has {has}; choose one with --text-field"
    if problem is None and not isinstance(value[field], str):
        problem = f"field '{field}' holds {type(value[field]).__name__}, expected text"
    if problem:
        raise DataError(f"{path}, line {number or _line_number(path, offset)}: {problem}")
    yield value[field], f"{path}, line {number}" if number else f"{path}, line at byte {offset}"


def _line_number(path: Path, offset: int) -> int:
    """1-based number of the line at a byte offset; counted only when an error needs it."""
    count = 1
    with open(path, "rb") as file:
        while offset > 0:
            block = file.read(min(offset, MIB))
            count += block.count(b"\n")
            offset -= len(block)
    return count
