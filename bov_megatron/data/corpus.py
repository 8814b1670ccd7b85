"""Raw text files: finding them, cutting them into units of work, reading their documents.

A *segment* is a file or an independently readable part of one (a byte range of JSON lines, row groups of Parquet). A
*unit* is a list of segments that one worker turns into shards. Both depend on the inputs alone, so the data set doesn't
depend on the number of workers.
"""

from __future__ import annotations

import bz2
import fnmatch
import glob
import gzip
import io
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None, ".zstd": None}
"""How to open a file of each suffix; None: through pyarrow."""
COMPRESSED_RATIO = 4
"""Assumed bytes of text per compressed byte; only sizes units."""
KNOWN_SUFFIXES = "text such as .txt .md .rst .py; .jsonl, also .gz .bz2 .xz .zst; .parquet"
INVALID_UTF8_POLICIES = ("error", "replace", "skip")
MIB = 1 << 20


@dataclass(frozen=True)
class Segment:
    """Part of an input file. `begin` and `end` count bytes for `jsonl`, row groups for `parquet`; else unused."""

    path: str
    kind: str
    """`text`, `jsonl`, `jsonl_compressed` or `parquet`."""
    begin: int
    end: int
    text_bytes: int
    """Estimate, for sizing units and the progress bar."""


@dataclass(frozen=True)
class Unit:
    """Work for one worker; `split` is `val` for inputs to hold out whole, else empty."""

    segments: tuple[Segment, ...]
    split: str = ""

    @property
    def text_bytes(self) -> int:
        return sum(segment.text_bytes for segment in self.segments)


@dataclass(frozen=True)
class Document:
    """`data` is the text in UTF-8, or None if it wasn't valid and the policy is `skip`; `where` is for messages."""

    data: bytes | None
    where: str


def find_files(inputs: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files of paths, folders (searched recursively for known suffixes, sorted) and glob patterns, without duplicates.

    Below a folder, hidden and `__pycache__` entries and names that match one of the patterns `exclude` are left out.
    Raises DataError where an input matches nothing.
    """
    by_real_path: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = _files_in(path, exclude)
            if not files:
                raise DataError(f"input folder {text} holds no file of a known kind ({KNOWN_SUFFIXES})")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
            if not files:
                raise DataError(f"input {text} does not exist, and no file matches it as a pattern")
        for file in files:
            by_real_path.setdefault(file.resolve(), file)
    if not by_real_path:
        raise DataError("no input given; name files, folders or glob patterns")
    return list(by_real_path.values())


def _files_in(folder: Path, exclude: Sequence[str]) -> list[Path]:
    patterns = [".*", "__pycache__", *exclude]

    def excluded(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns)

    return [path for path in sorted(folder.rglob("*")) if _is_known(path) and not excluded(path) and path.is_file()]


def _is_known(path: Path) -> bool:
    """Whether a file found in a folder is read; others must be named, or matched by a glob pattern."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower() in JSONL_SUFFIXES
    # Plain .json files in folders are seldom JSON lines.
    return suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES - {".json"} or suffix == ".parquet"


def kind_of(path: Path) -> str:
    """`Segment.kind` of a file, by its name. Unknown suffixes are text: such a file was named explicitly."""
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
    """Cut files into units of about `unit_bytes` of text; default: a 64th of all text, between 1 and 128 MiB."""
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

    Args:
        text_field: field of JSON lines, column of Parquet.
        invalid_utf8: `error`, `replace` (by U+FFFD) or `skip` (yields a document whose `data` is None).

    Raises DataError for unreadable files, missing fields and invalid text.
    """
    path = Path(segment.path)
    if segment.kind == "text":
        pairs: Iterable[tuple[bytes | str, str]] = [(path.read_bytes(), str(path))]
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
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        if policy == "error":
            place = f"{'byte' if isinstance(raw, bytes) else 'character'} {error.start}"
            raise DataError(
                f"{where}: not valid UTF-8 ({error.reason} at {place}); convert it, or pass --invalid-utf8 replace or "
                "skip"
            ) from None
        if policy == "skip":
            return None
        if isinstance(raw, bytes):
            return raw.decode(errors="replace").encode()
        # Lone surrogates, which JSON can spell; encode(errors="replace") would give "?" instead of U+FFFD.
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in raw).encode()


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


def _lines_from(file: io.BufferedIOBase, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in [begin, end), so each line belongs to exactly one range."""
    if begin:
        file.seek(begin - 1)
        file.readline()
    offset = file.tell()
    while offset < end:
        line = file.readline()
        yield offset, line
        offset += len(line)


def _open_compressed(path: Path) -> io.BufferedIOBase:
    if open_file := COMPRESSIONS[path.suffix.lower()]:
        return open_file(path)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), MIB)


def _json_field(line: bytes, path: Path, field: str, offset: int, number: int | None) -> Iterator[tuple[str, str]]:
    if not line.strip():
        return
    try:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:  # `_valid_utf8` applies the policy
            value = json.loads(line.decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno}); each line must be one object"
    else:
        if not isinstance(value, dict):
            problem = f"expected an object, found {type(value).__name__}; each line must be one object"
        elif field not in value:
            fields = ", ".join(map(str, value)) or "no fields"
            problem = f"no field '{field}'; it has {fields}; choose one with --text-field"
        elif not isinstance(value[field], str):
            problem = f"field '{field}' holds {type(value[field]).__name__}, expected text"
        else:
            yield value[field], f"{path}, line {number}" if number else f"{path}, line at byte {offset}"
            return
    raise DataError(f"{path}, line {number or _line_number(path, offset)}: {problem}")


def _line_number(path: Path, offset: int) -> int:
    """1-based number of the line at a byte offset, for an error message."""
    count = 1
    with open(path, "rb") as file:
        while offset > 0:
            block = file.read(min(offset, MIB))
            count += block.count(b"\n")
            offset -= len(block)
    return count
