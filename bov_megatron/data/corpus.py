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
import os
import zlib
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
SHOWN_FIELDS = 12
SHOWN_BAD_ROWS = 10
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
class Place:
    """Where a document comes from."""

    path: str
    kind: str = "file"
    """What `number` counts: `line` (from 1), `byte` (where a line begins; its number isn't known yet), `row` of a
    Parquet file (from 0), or `file` (the whole file is the document)."""
    number: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return self.path
        return f"{self.path}, {'line at byte' if self.kind == 'byte' else self.kind} {self.number}"


@dataclass(frozen=True)
class Document:
    """`data` is the text in UTF-8; None if it is left out, as `problem` says, or as not valid UTF-8."""

    data: bytes | None
    place: Place
    problem: str | None = None


def find_files(inputs: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files of paths, folders (searched recursively for known suffixes, sorted) and glob patterns, without duplicates.

    Below a folder, hidden and `__pycache__` entries and names that match one of the patterns `exclude` are left out.
    Raises DataError where an input matches nothing.
    """
    by_real_path: dict[Path, Path] = {}
    for text in inputs:
        path = Path(os.path.expanduser(text))
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


def read_documents(
    segment: Segment, text_field: str, invalid_utf8: str = "error", skip_bad: bool = False
) -> Iterator[Document]:
    """The documents of a segment, in order.

    Args:
        text_field: field of JSON lines, column of Parquet.
        invalid_utf8: `error`, `replace` (by U+FFFD) or `skip` (yields a document whose `data` is None).
        skip_bad: yield a row that is null, malformed or without the field as a document with a `problem`.

    Raises DataError for unreadable files, for invalid text, and without `skip_bad` for a bad row.
    """
    path = Path(segment.path)
    try:
        for row, place in _rows(path, segment, text_field):
            if not isinstance(row, _Bad):
                yield Document(_valid_utf8(row, place, invalid_utf8), place)
            elif skip_bad:
                yield Document(None, place, row.problem)
            else:
                raise DataError(f"{LineNumbers().resolve(place)}: {row.problem}; --skip-bad leaves such rows out")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Bad:
    problem: str


_Row = tuple[bytes | str | _Bad, Place]


def _rows(path: Path, segment: Segment, text_field: str) -> Iterable[_Row]:
    if segment.kind == "text":
        return [(path.read_bytes(), Place(str(path)))]
    if segment.kind == "parquet":
        return _parquet_rows(path, segment, text_field)
    if segment.kind == "jsonl":
        return _json_lines(path, segment, text_field)
    return _compressed_json_lines(path, text_field)


def _valid_utf8(raw: bytes | str, where: Place, policy: str) -> bytes | None:
    try:
        if isinstance(raw, str):
            return raw.encode()
        raw.decode()
        return raw
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        if policy == "error":
            place = f"{'byte' if isinstance(raw, bytes) else 'character'} {error.start}"
            raise DataError(
                f"{LineNumbers().resolve(where)}: not valid UTF-8 ({error.reason} at {place}); convert it, or pass "
                "--invalid-utf8 replace or skip"
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
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {_one_line(error)}") from None


def _parquet_rows(path: Path, segment: Segment, column: str) -> Iterator[_Row]:
    import pyarrow

    file = _open_parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{path}: no column '{column}'; it has {_listed(names)}; choose one with --text-field")
    row = sum(file.metadata.row_group(group).num_rows for group in range(segment.begin))
    for group in range(segment.begin, segment.end):
        try:
            # A dot in the argument `columns` would mean a field of a struct.
            table = file.read_row_group(group, columns=None if "." in column else [column])
            values = table.column(table.schema.names.index(column))
            kind = values.type.value_type if pyarrow.types.is_dictionary(values.type) else values.type
            if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
                # As bytes, because those of a string column need not be valid UTF-8.
                values = values.cast(kind).cast(pyarrow.large_binary())
            items = values.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}, row group {group} can't be read: {_one_line(error)}") from None
        for value in items:
            problem = f"column '{column}' holds {_type_name(value)}, expected text"
            yield value if isinstance(value, (str, bytes)) else _Bad(problem), Place(str(path), "row", row)
            row += 1


def _json_lines(path: Path, segment: Segment, field: str) -> Iterator[_Row]:
    with open(path, "rb") as file:
        for offset, line in _lines_from(file, segment.begin, segment.end):
            if line.strip():
                yield _json_field(line, field), Place(str(path), "byte", offset)


def _compressed_json_lines(path: Path, field: str) -> Iterator[_Row]:
    number = 0
    try:
        with _open_compressed(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_field(line, field), Place(str(path), "line", number)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path} can't be unpacked after line {number}: {_one_line(error)}; is the file complete?"
        ) from None


def _lines_from(file: io.BufferedIOBase, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in [begin, end), so each line belongs to exactly one range."""
    if begin:
        file.seek(begin - 1)
        file.readline()
    offset = file.tell()
    while offset < end and (line := file.readline()):
        yield offset, line
        offset += len(line)


def _open_compressed(path: Path) -> io.BufferedIOBase:
    if open_file := COMPRESSIONS[path.suffix.lower()]:
        return open_file(path)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), MIB)


def _json_field(line: bytes, field: str) -> str | _Bad:
    try:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:  # `_valid_utf8` applies the policy
            value = json.loads(line.decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        return _Bad(f"not valid JSON ({error.msg} at column {error.colno}); each line must be one object")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return _Bad(f"not readable as JSON ({_one_line(error)})")
    if not isinstance(value, dict):
        return _Bad(f"expected an object, found {_type_name(value)}; each line must be one object")
    if field not in value:
        return _Bad(f"no field '{field}'; it has {_listed(list(value)) or 'no fields'}; choose one with --text-field")
    if not isinstance(value[field], str):
        return _Bad(f"field '{field}' holds {_type_name(value[field])}, expected text")
    return value[field]


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return ", ".join(names[:SHOWN_FIELDS]) + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def bad_rows_message(count: int, first: Sequence[Document], listed_in: Path | None = None) -> str:
    """How many rows were left out, and the first of them, a line each."""
    where = f", listed in {listed_in}" if listed_in else ""
    more = [f"  and {count - len(first)} more"] if count > len(first) else []
    rows = [f"  {LineNumbers().resolve(row.place)}: {row.problem}" for row in first]
    return "\n".join([f"{count} bad rows left out{where}:", *rows, *more])


class LineNumbers:
    """Line numbers of places known by their byte. Asked in the order of a file, it is read once."""

    def __init__(self) -> None:
        self._path, self._offset, self._line = "", 0, 1

    def resolve(self, place: Place) -> Place:
        """The same place, by line instead of byte."""
        if place.kind != "byte":
            return place
        if place.path != self._path or place.number < self._offset:
            self._path, self._offset, self._line = place.path, 0, 1
        with open(place.path, "rb") as file:
            file.seek(self._offset)
            while self._offset < place.number and (block := file.read(min(place.number - self._offset, MIB))):
                self._line += block.count(b"\n")
                self._offset += len(block)
        return Place(place.path, "line", self._line)
