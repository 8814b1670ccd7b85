import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from bov_megatron.data.corpus import find_files, make_units, read_documents
from bov_megatron.errors import DataError

TEXTS = [f"document {i}: " + "äöü 日本 " * (i % 7) + "\n" * (i % 3) for i in range(300)]


def documents(path, unit_bytes=None, **options):
    options = {"text_field": "text", **options}
    units = make_units(find_files([str(path)]), unit_bytes)
    return [d.data for unit in units for segment in unit.segments for d in read_documents(segment, **options)]


def write_lines(path, values, opener=open):
    with opener(path, "wb") as file:
        file.write("\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode())
    return path


@pytest.mark.parametrize("unit_bytes", [1, 37, 1000, 10**9])
def test_each_json_line_belongs_to_one_range(tmp_path, unit_bytes):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:60]])
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n\n", 5) + b"\n \n")
    assert documents(path, unit_bytes) == [text.encode() for text in TEXTS[:60]]


def test_compressed_json_lines_read_as_plain(tmp_path):
    lines = [{"body": text} for text in TEXTS]
    write_lines(tmp_path / "a.jsonl.gz", lines, gzip.open)
    write_lines(tmp_path / "b.jsonl.bz2", lines, bz2.open)
    write_lines(tmp_path / "c.jsonl.xz", lines, lzma.open)
    write_lines(tmp_path / "d.json.zst", lines, lambda p, _: pyarrow.output_stream(str(p), compression="zstd"))
    assert documents(tmp_path, text_field="body") == [text.encode() for text in TEXTS] * 4


def test_parquet_row_groups_are_units(tmp_path):
    table = pyarrow.table({"id": list(range(300)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert len(make_units(find_files([str(tmp_path)]), 1000)) > 5
    assert documents(tmp_path, 1000) == [text.encode() for text in TEXTS]
    with pytest.raises(DataError, match="no column 'body'; it has id, text"):
        documents(tmp_path, text_field="body")
    with pytest.raises(DataError, match="a.parquet, row 0: column 'id' holds int"):
        documents(tmp_path, text_field="id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        documents(tmp_path)


def test_folder_order_is_by_path_and_leaves_out_what_is_not_text(tmp_path):
    for name in (
        "b/2.txt",
        "b/1.md",
        "a.py",
        ".hidden/x.txt",
        "__pycache__/y.py",
        "picture.png",
        "files.tar.gz",
        "c.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path), str(tmp_path / "a.py")])]
    assert names == ["a.py", "b/1.md", "b/2.txt"]
    left = [path.name for path in find_files([str(tmp_path)], exclude=["a.*", "1*"])]
    assert left == ["2.txt"] and len(find_files([str(tmp_path)], exclude=["b"])) == 1
    assert documents(tmp_path / "picture.png") == [b"picture.png"], "a file named explicitly is read as text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "line 43: no field 'text'; it has body; choose one with --text-field"),
        ('{"text": 5}', "line 43: field 'text' holds int"),
        ('["text"]', "line 43: expected an object, found list"),
        ('{"text": "x"', "line 43: not valid JSON"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_are_named(tmp_path, line, message, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    good = [json.dumps({"text": text}) for text in TEXTS]
    (gzip.open if suffix else open)(path, "wb").write("\n".join([*good[:42], line, *good[42:]]).encode())
    with pytest.raises(DataError, match=message):
        documents(path, 500)


def test_invalid_utf8_follows_the_policy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 x")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "lone \\ud83d surrogate"}\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"a\.txt: not valid UTF-8 .*byte 3.*--invalid-utf8 replace or skip"):
        documents(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not valid UTF-8"):
        documents(tmp_path / "b.jsonl")
    assert documents(tmp_path, invalid_utf8="skip") == [None, None, None, b"fine"]
    replaced = [data.decode() for data in documents(tmp_path, invalid_utf8="replace")]
    assert replaced == ["caf\ufffd x", "caf\ufffd", "lone \ufffd surrogate", "fine"]


def test_inputs_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match="holds no file of a known kind"):
        find_files([str(tmp_path)])
    (tmp_path / "a.txt.gz").write_bytes(b"")
    with pytest.raises(DataError, match="only JSON lines may be compressed"):
        documents(tmp_path / "a.txt.gz")


def test_truncated_compressed_file_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", [{"text": text * 50} for text in TEXTS], gzip.open)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz can't be unpacked after line \d+.*complete"):
        documents(path)
