import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bov_megatron.compat import register_missing_torchvision_ops
from bov_megatron.data.manifest import read_manifest
from bov_megatron.data.tokenizer import load_bytes_per_token
from bov_megatron.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, prepare
from tests.support.small_disk import fill

TOOL = Path(__file__).resolve().parents[2] / "tools/prepare_data.py"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_tokens(folder: Path, split: str) -> np.ndarray:
    """A split's samples as mosaicml-streaming's own reader gives them: `[samples, T + 1]`."""
    register_missing_torchvision_ops()
    from streaming import LocalDataset

    data_set = LocalDataset(local=str(folder), split=split)
    return np.stack([data_set[i]["tokens"] for i in range(len(data_set))])


def documents_of(library: Path, *folders: str) -> list[str]:
    paths = [
        path
        for name in folders
        for path in sorted((library / name).rglob("*"))
        if path.suffix in (".py", ".txt", ".rst")
    ]
    return [path.read_text(encoding="utf-8") for path in paths if "__pycache__" not in path.parts]


def test_shards_hold_the_documents_in_order(library, tokenizer_folder, tmp_path):
    """One unit, nothing held out: stored is <|bos|> document <|bos|> document …, by another tokenizer API."""
    from transformers import AutoTokenizer

    manifest = prepare([library / "email"], tokenizer_folder, tmp_path / "d", unit_bytes=10**9, validation_fraction=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "d" / "tokenizer")
    texts = [text for text in documents_of(library, "email") if text]
    expected = [i for text in texts for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    found = stored_tokens(tmp_path / "d", "train").ravel()
    assert found.dtype == np.uint16 and found.tolist() == expected[: len(found)]
    split = manifest.splits["train"]
    # The unit's tail begins inside a document and so got a border of its own.
    assert len(expected) - len(found) == split.dropped_tokens - 1 < SEQUENCE_LENGTH
    assert split.tokens == len(found) == split.samples * (SEQUENCE_LENGTH + 1)
    assert split.documents == len(texts) and split.bytes == sum(len(text.encode()) for text in texts)


def test_nothing_is_lost_between_units(data_folder, library):
    """All tokens but less than a sample per split are stored, over many units, and the bytes they stand for add up."""
    manifest = read_manifest(data_folder)
    lengths = load_bytes_per_token(data_folder / "tokenizer")
    assert len(list((data_folder / "train").glob("unit-*"))) > 5
    stored = 0
    for name, split in manifest.splits.items():
        tokens = stored_tokens(data_folder, name)
        assert tokens.shape == (split.samples, SEQUENCE_LENGTH + 1) and split.dropped_tokens < SEQUENCE_LENGTH + 1
        size = int(lengths[tokens].sum())
        assert 0 <= split.bytes - size <= split.dropped_tokens * lengths.max()
        stored += size
    texts = documents_of(library, "email", "asyncio")
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in texts)
    assert manifest.empty_documents == sum(not text for text in texts)


def test_held_out_documents_are_not_trained_on(library, tokenizer_folder, tmp_path):
    prepare(
        [library / "email"], tokenizer_folder, tmp_path / "d", validation_fraction=0.3, keep_held_out_text=True,
        unit_bytes=10**9,
    )  # fmt: skip
    lines = (tmp_path / "d/val/documents.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    held_out = [json.loads(line)["text"] for line in lines]
    texts = [text for text in documents_of(library, "email") if text]
    tokenizer = Tokenizer.from_file(str(tmp_path / "d/tokenizer/tokenizer.json"))
    assert 0 < len(held_out) < len(texts) and set(held_out) < set(texts)
    for split, documents in (("val", held_out), ("train", [t for t in texts if t not in set(held_out)])):
        decoded = tokenizer.decode(stored_tokens(tmp_path / "d", split).ravel().tolist(), skip_special_tokens=True)
        assert decoded.encode()[:-4] == "".join(documents).encode()[: len(decoded.encode()) - 4]


def test_validation_inputs_are_held_out_whole(library, tokenizer_folder, tmp_path):
    manifest = prepare([library / "email"], tokenizer_folder, tmp_path / "d", validation=[str(library / "json")])
    assert manifest.splits["val"].bytes == sum(len(text.encode()) for text in documents_of(library, "json"))
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in documents_of(library, "email"))


def test_workers_do_not_change_the_data_set(library, tokenizer_folder, data_folder, tmp_path):
    inputs = [library / "email", library / "asyncio"]
    prepare(inputs, tokenizer_folder, tmp_path / "d", workers=3, validation_fraction=0.1, shard_bytes=20_000)
    assert tree(tmp_path / "d") == tree(data_folder)


def in_another_process(*arguments, **options):
    """Start prepare() in a process of its own, which exits with 2 and its message in `stderr.txt` on a DataError."""

    def run():
        try:
            prepare(*arguments, **options)
        except DataError as error:
            (arguments[2].parent / "stderr.txt").write_text(str(error))
            os._exit(2)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 120
    while len(list((arguments[2] / ".work").glob("unit-*.json"))) < 3 and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process


def test_killed_in_the_middle_then_run_again_equals_undisturbed(library, tokenizer_folder, tmp_path):
    inputs = [str(library / name) for name in ("email", "asyncio", "unittest", "multiprocessing", "importlib")]
    options = {"unit_bytes": 50_000, "validation_fraction": 0.1, "workers": 2}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    command = [sys.executable, str(TOOL), *inputs, "--tokenizer", str(tokenizer_folder), "--out", str(undisturbed)]
    command += ["--sequence-length", str(SEQUENCE_LENGTH), "--unit-bytes", "50000", "--validation-fraction", "0.1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "train: " in done.stdout and "tokens/s" in done.stdout and "packing: 100%" in done.stderr

    process = in_another_process(inputs, tokenizer_folder, killed, **options)
    process.kill()
    process.join()
    time.sleep(0.5)  # workers notice that their parent is gone
    assert not (killed / "manifest.json").exists(), "must be killed in the middle"
    with pytest.raises(DataError, match=r"no manifest\.json, so it is not complete; run `bov prepare-data` again"):
        read_manifest(killed)
    with pytest.raises(DataError, match=r"unfinished data set begun with sequence_length=128 \(now 64\)"):
        prepare(inputs, tokenizer_folder, killed, **options, sequence_length=64)

    # A hard link shows whether the second run left a unit alone: a shard written again is another file.
    finished = [path.stem for path in (killed / ".work").glob("unit-*.json")]
    shards = [path for name in finished for path in (killed / "train" / name).glob("*.mds")]
    for number, shard in enumerate(shards):
        os.link(shard, tmp_path / f"link-{number}")
    assert len(finished) >= 3 and shards
    prepare(inputs, tokenizer_folder, killed, **options)
    assert tree(killed) == tree(undisturbed)
    assert all(os.path.samefile(shard, tmp_path / f"link-{number}") for number, shard in enumerate(shards))
    tool_again = subprocess.run(command, capture_output=True, text=True)
    assert tool_again.returncode == 2 and "holds a complete data set; pass --overwrite" in tool_again.stderr


def test_changed_input_is_not_mixed_into_an_unfinished_data_set(tokenizer_folder, library, tmp_path):
    lines = [json.dumps({"text": text}) for text in documents_of(library, "email", "asyncio")]
    path, options = tmp_path / "a.jsonl", {"unit_bytes": 20_000, "validation_fraction": 0.0}
    path.write_text("\n".join(lines))
    process = in_another_process([path], tokenizer_folder, tmp_path / "d", **options)
    process.kill()
    process.join()
    time.sleep(0.5)
    assert not (tmp_path / "d/manifest.json").exists()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="other input files, or files changed since.*--overwrite"):
        prepare([path], tokenizer_folder, tmp_path / "d", **options)
    prepare([path], tokenizer_folder, tmp_path / "d", overwrite=True, **options)


@pytest.fixture
def spoilt(library, tmp_path):
    """JSON lines of four units and a Parquet file, with bad rows, and the same without them."""
    texts = documents_of(library, "email", "json")
    lines = [json.dumps({"text": text}) for text in texts]
    bad = {5: '{"text": null}', 6: '{"body": "x"}', len(lines) - 1: '{"text": 5}', len(lines): "{'text'"}
    for folder, left_out in (("spoilt", bad), ("clean", {})):
        (tmp_path / folder).mkdir()
        held = [line for i, line in enumerate(lines) for line in ([left_out[i]] if i in left_out else []) + [line]]
        held += [left_out[len(lines)]] if left_out else []
        (tmp_path / folder / "a.jsonl").write_text("\n".join(held))
        column = [text for i, text in enumerate(texts) for text in ([None] if i == 7 and left_out else []) + [text]]
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / folder / "b.parquet", row_group_size=4)
    return tmp_path, len(lines)


def test_bad_rows_are_left_out_when_told_and_listed(spoilt, tokenizer_folder, capfd):
    (folder, count), options = spoilt, {"unit_bytes": 60_000, "validation_fraction": 0.0}
    manifest = prepare([folder / "spoilt"], tokenizer_folder, folder / "d", skip_bad=True, **options)
    found = [json.loads(line) for line in (folder / "d/bad_rows.jsonl").read_text().splitlines()]
    assert [row.get("line") for row in found] == [6, 8, count + 2, count + 4, None]
    assert found[4] == {
        "file": str(folder / "spoilt/b.parquet"), "row": 7, "problem": "column 'text' holds null, expected text"
    }  # fmt: skip
    problems = ["holds null", "no field 'text'; it has body", "holds int", "not valid JSON"]
    assert all(problem in row["problem"] for problem, row in zip(problems, found, strict=False))
    err = capfd.readouterr().err
    assert manifest.bad_rows == 5 and f"5 bad rows left out, listed in {folder}/d/bad_rows.jsonl:\n" in err
    assert f"  {folder}/spoilt/a.jsonl, line 6: field 'text' holds null, expected text\n" in err
    clean = prepare([folder / "clean"], tokenizer_folder, folder / "c", **options)
    assert sum(s.bytes for s in manifest.splits.values()) == sum(s.bytes for s in clean.splits.values())
    assert sum(s.documents for s in manifest.splits.values()) == sum(s.documents for s in clean.splits.values())


def test_a_bad_row_is_found_before_anything_is_tokenized(spoilt, tokenizer_folder, monkeypatch):
    from bov_megatron.data import prepare as module

    folder, _ = spoilt

    def too_early(*_):
        raise AssertionError("tokenized")

    monkeypatch.setattr(module, "pack_unit", too_early)
    for name, message in (
        ("a.jsonl", "line 6: field 'text' holds"),
        ("b.parquet", "row 7: column 'text' holds"),
    ):
        with pytest.raises(DataError, match=f"{name}, {message} null, expected text; --skip-bad leaves such rows out"):
            prepare([folder / "spoilt" / name], tokenizer_folder, folder / "d")
        assert not (folder / "d").exists()


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(library, tokenizer_folder, small_disk, data_folder):
    inputs, options = [library / "email", library / "asyncio"], {"validation_fraction": 0.1, "shard_bytes": 20_000}
    fill(small_disk, leave=300_000)
    with pytest.raises(DataError) as error:
        prepare(inputs, tokenizer_folder, small_disk / "d", workers=2, **options)
    start, _, end = str(error.value).partition("; about ")
    assert start == f"could not write {small_disk}/d: No space left on device"
    found = re.match(r"(\d\.\d) MiB are needed and 0\.\d MiB are free in \S+/d; free space there and run the same", end)
    stored = sum(path.stat().st_size for path in data_folder.rglob("*.mds")) / 2**20
    assert float(found[1]) == pytest.approx(stored, rel=0.3)
    assert not list((small_disk / "d").rglob("*.tmp")) and not (small_disk / "d/manifest.json").exists()
    finished = list((small_disk / "d/.work").glob("unit-*.json"))
    (small_disk / "filler").unlink()
    prepare(inputs, tokenizer_folder, small_disk / "d", **options)
    assert finished and tree(small_disk / "d") == tree(data_folder)


def test_a_disk_without_any_space(library, tokenizer_folder, small_disk):
    fill(small_disk, leave=0)
    with pytest.raises(DataError, match="No space left on device; about .* MiB are needed"):
        prepare([library / "json"], tokenizer_folder, small_disk / "d")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_an_interrupted_run_does_not_wait_for_its_workers(library, tokenizer_folder, tmp_path):
    """SIGINT to the tool alone, as from a scheduler; a unit here takes seconds."""
    text = "".join(path.read_text() for path in sorted((library / "email").glob("*.py"))) * 20
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    command = [sys.executable, str(TOOL), str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--quiet", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "d")],
        stderr=subprocess.PIPE,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "d/.work").glob("unit-*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and workers and not any(worker.is_running() for worker in workers)
    assert not list((tmp_path / "d/.work").glob("unit-*")), "neither waited for a unit, nor left a part of one"


def test_a_killed_worker_is_explained(library, tokenizer_folder, tmp_path):
    out = tmp_path / "d"
    process = in_another_process([library / "unittest", library / "asyncio"], tokenizer_folder, out, unit_bytes=30_000)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.join(60)
    message = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 2 and "a worker process was killed" in message and "run the same command" in message


def test_interrupted_from_the_keyboard_says_how_to_go_on(library, tokenizer_folder, tmp_path):
    command = [sys.executable, str(TOOL), *[str(library / name) for name in ("unittest", "asyncio", "email")]]
    options = ["--tokenizer", str(tokenizer_folder), "--unit-bytes", "20000", "--workers", "2", "--quiet"]
    process = subprocess.Popen(
        [*command, *options, "--out", str(tmp_path / "d")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that a shell runs in the background inherit that it ignores SIGINT.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "d/.work").glob("unit-*.json")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == "interrupted; run the same command again to go on\n"


def test_two_runs_do_not_write_to_one_folder(library, tokenizer_folder, tmp_path):
    options = {"unit_bytes": 30_000, "validation_fraction": 0.0}
    process = in_another_process([library / "unittest"], tokenizer_folder, tmp_path / "d", **options)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match="another run is writing there"):
            prepare([library / "unittest"], tokenizer_folder, tmp_path / "d", **options)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert (tmp_path / "d/manifest.json").exists()


def test_complete_data_set_is_replaced_only_when_told(library, tokenizer_folder, tmp_path):
    out = tmp_path / "d"
    prepare([library / "json"], tokenizer_folder, out, validation_fraction=0.0)
    before = tree(out)
    with pytest.raises(DataError, match="holds a complete data set; pass --overwrite"):
        prepare([library / "email"], tokenizer_folder, out)
    assert tree(out) == before
    prepare([library / "email"], tokenizer_folder, out, overwrite=True, validation_fraction=0.0)
    assert tree(out) != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files \(notes.txt\)"):
        prepare([library / "json"], tokenizer_folder, out, overwrite=True)


def test_large_vocabularies_are_stored_as_uint32(library, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [a + b + c for a in alphabet[:64] for b in alphabet[:40] for c in alphabet[:40]]
    vocab = {token: i for i, token in enumerate(["<s>", *words, *alphabet])}  # bytes get the highest ids
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tmp_path / "t").mkdir()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "t/tokenizer.json"))
    (tmp_path / "t/tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    manifest = prepare([library / "json"], tmp_path / "t", tmp_path / "d", validation_fraction=0.0, unit_bytes=10**9)
    tokens = stored_tokens(tmp_path / "d", "train").ravel()
    assert manifest.dtype == "uint32" and manifest.vocab_size == len(vocab) and tokens.max() > 1 << 16
    assert tokenizer.decode(tokens.tolist()).startswith(documents_of(library, "json")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"validation_fraction": 1.5}, "--validation-fraction 1.5"),
        ({"workers": 0}, "--workers 0"),
        ({"shard_bytes": 100}, "--shard-bytes 100: must be from"),
        ({"unit_bytes": 0}, "--unit-bytes 0"),
        ({"invalid_utf8": "ignore"}, "--invalid-utf8 ignore: choose"),
        ({"tokenizer": "/nowhere"}, "--tokenizer /nowhere: no tokenizer.json"),
        ({"inputs": ["/nowhere/*.txt"]}, r"/nowhere/\*.txt does not exist"),
        ({"sequence_length": 10**7, "shard_bytes": 1 << 31}, "gives no training sample: .* smaller --sequence-length"),
        ({"validation_fraction": 1e-9}, "held-out split has no sample: 0 documents.*raise --validation-fraction"),
    ],
)
def test_bad_options_are_refused(library, tokenizer_folder, tmp_path, options, message):
    options = {"inputs": [str(library / "json")], "tokenizer": tokenizer_folder, "validation_fraction": 0.0, **options}
    with pytest.raises(DataError, match=message):
        prepare(options.pop("inputs"), options.pop("tokenizer"), tmp_path / "d", **options)
    assert not (tmp_path / "d/manifest.json").exists()


def test_empty_corpus_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"gives no training sample: 0 documents.*\(1 empty documents\)"):
        prepare([tmp_path / "a.txt"], tokenizer_folder, tmp_path / "d")
