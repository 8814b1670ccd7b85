import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from bov_megatron.compat import register_missing_torchvision_ops
from bov_megatron.data.tokenizer import (
    BOS_TOKEN,
    PRE_TOKEN_CHARACTERS,
    load_bytes_per_token,
    load_encoder,
    split_at_words,
    tokenizer_hash,
    train_tokenizer,
)
from bov_megatron.errors import DataError
from tests.data.conftest import VOCAB_SIZE
from tests.data.test_prepare import tree
from tests.support.small_disk import fill
from tests.support.tiny_tokenizer import STDLIB

ROOT = Path(__file__).resolve().parents[2]
MIXED = "naïve café — 日本語のテキスト 🎉👩‍👩‍👧 x = {'a': 1}\r\n\tпривет\n"


@pytest.fixture(scope="module")
def hugging_face(tokenizer_folder):
    register_missing_torchvision_ops()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


def test_auto_tokenizer_opens_the_folder_and_agrees_with_the_encoder(hugging_face, encoder, library):
    text = (library / "argparse.py").read_text() + MIXED
    ids = hugging_face(text, add_special_tokens=False)["input_ids"]
    assert ids == encoder.encode([text])[0].tolist()
    assert hugging_face.decode(ids) == text
    assert len(hugging_face) == encoder.vocab_size == VOCAB_SIZE
    assert hugging_face.bos_token == BOS_TOKEN and hugging_face.bos_token_id == encoder.bos_token_id


def test_bytes_per_token_sum_to_the_length_of_real_text(encoder, tokenizer_folder, library):
    lengths = load_bytes_per_token(tokenizer_folder)
    files = sorted((library / "encodings").glob("*.py")) + [library / "argparse.py"]
    for text in [*(path.read_text(encoding="utf-8") for path in files), MIXED]:
        assert lengths[encoder.encode([text])[0]].sum() == len(text.encode())
    assert lengths[encoder.bos_token_id] == 0
    assert (np.delete(lengths, encoder.bos_token_id) > 0).all()


def test_decoding_single_ids_would_miscount(hugging_face, tokenizer_folder):
    lengths = load_bytes_per_token(tokenizer_folder)
    decoded = [len(hugging_face.decode([index]).encode()) for index in range(VOCAB_SIZE)]
    assert sum(a != b for a, b in zip(decoded, lengths.tolist(), strict=True)) > 100


def test_text_that_spells_the_special_token_forges_no_border(encoder):
    ids = encoder.encode([f"before {BOS_TOKEN} after"])[0]
    assert encoder.bos_token_id not in ids
    assert encoder.fast.decode(ids.tolist()) == f"before {BOS_TOKEN} after"


def test_an_encoder_that_was_sent_encodes_the_same(encoder):
    """A pickle of the library's tokenizer forgets that text can't spell special tokens."""
    sent = pickle.loads(pickle.dumps(encoder))
    text = f"a{BOS_TOKEN}b " + MIXED
    assert sent.encode([text])[0].tolist() == encoder.encode([text])[0].tolist()
    assert sent.hash == encoder.hash


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_encoding_in_pieces_equals_encoding_the_whole(encoder, library, size):
    text = (library / "argparse.py").read_text() + "\n\n \n" + MIXED + "\r\n\r\n  x\n"
    pieces = split_at_words(text, size)
    assert "".join(pieces) == text and len(pieces) > min(3000, 90_000 // size // 5)
    gpt2 = Tokenizer(models.BPE())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for pre in (encoder.fast.pre_tokenizer, gpt2.pre_tokenizer):
        whole = [token for token, _ in pre.pre_tokenize_str(text)]
        assert [token for piece in pieces for token, _ in pre.pre_tokenize_str(piece)] == whole
    whole = encoder.fast.encode(text, add_special_tokens=False).ids
    assert np.concatenate(encoder.encode(pieces)).tolist() == whole


RUNS = "".join(character * 3000 for character in "aЯ語-🎉\n\t 7'") + "x" * 255 + " y" + "." * 256 + "\r\n" * 300


def test_no_word_is_longer_than_the_cap(encoder, hugging_face, tokenizer_folder, tmp_path):
    """Text without spaces is not one word, for Hugging Face either, and pieces give the same ids."""
    words = [text for text, _ in encoder.splitter.pre_tokenize_str(RUNS)]
    assert "".join(words) == RUNS and max(map(len, words)) <= 2 * PRE_TOKEN_CHARACTERS + 1
    whole = hugging_face(RUNS, add_special_tokens=False)["input_ids"]
    for size in (100, 700, 1 << 18):
        pieces = split_at_words(RUNS, size, encoder.splitter)
        assert "".join(pieces) == RUNS and max(map(len, pieces)) <= size + 2 * PRE_TOKEN_CHARACTERS + 1
        assert np.concatenate(encoder.encode(pieces)).tolist() == whole
    hugging_face.save_pretrained(tmp_path / "exported")
    assert load_encoder(tmp_path / "exported").splitter is not None
    assert load_encoder(tmp_path / "exported").encode([RUNS])[0].tolist() == whole


# Few characters of every class of the pattern, in runs that reach the cap, cut in small pieces.
RUNS_OF_TEXT = st.lists(
    st.tuples(st.sampled_from("abЯ語'sl-.€ \t\n\r\u00a07½"), st.sampled_from([1, 1, 1, 2, 3, 5, 255, 256, 257, 600])),
    max_size=14,
).map(lambda runs: "".join(character * count for character, count in runs))


@given(text=RUNS_OF_TEXT, size=st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_text_are_split_as_the_whole(encoder, text, size):
    pieces = split_at_words(text, size, encoder.splitter)
    assert "".join(pieces) == text
    split = encoder.splitter.pre_tokenize_str
    assert [word for piece in pieces for word, _ in split(piece)] == [word for word, _ in split(text)]


def test_training_can_be_interrupted(tmp_path):
    """The library's code does not return to Python, which would be told of a signal only at its end."""
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices(string.ascii_lowercase, k=3_000_000)))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    sent = []

    def interrupt():
        time.sleep(3)  # checking takes less, training twelve seconds of processor time
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "t", vocab_size=20_000, progress=False)
        assert sent and time.monotonic() - sent[0] < 2  # and far less but on a loaded machine
        assert not [child for child in psutil.Process().children() if "pytest" in " ".join(child.cmdline())]
        assert not (tmp_path / "t").exists()
    finally:
        signal.signal(signal.SIGINT, former)


def test_bad_rows_are_refused_or_left_out_and_named(library, tmp_path, capfd):
    text = (library / "argparse.py").read_text()
    rows = [{"text": text[i : i + 300]} for i in range(0, 60_000, 300)]
    lines = [json.dumps(row) for row in rows]
    lines[100:100] = ['{"text": null}', '{"body": "x"}', "{", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train = {"vocab_size": 400, "progress": False}
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 101: field 'text' holds null, .*--skip-bad leaves such rows out"
    ):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", **train)
    assert not (tmp_path / "t").exists()
    encoder = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", skip_bad=True, **train)
    err = capfd.readouterr().err
    assert "3 bad rows left out:\n" in err and f"  {tmp_path}/a.jsonl, line 102: no field 'text'; it has body" in err
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    clean = train_tokenizer([str(tmp_path / "b.jsonl")], tmp_path / "clean", **train)
    assert encoder.hash == clean.hash


def test_a_full_disk_leaves_no_tokenizer(library, small_disk):
    fill(small_disk, leave=30_000)
    message = r"could not write \S+/t: No space left .*; about 0\.\d MiB are needed and 0\.\d MiB are free in "
    with pytest.raises(DataError, match=message):
        train_tokenizer([str(library / "json")], small_disk / "t", vocab_size=600, progress=False)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_tokenizer_is_replaced_as_a_whole(library, tokenizer_folder, tmp_path, monkeypatch):
    """Interrupted before each renaming in turn: the tokenizer is that from before, and nothing lies beside it."""
    out = tmp_path / "t"
    shutil.copytree(tokenizer_folder, out)
    before = tree(out)
    calls = 0

    def interrupt_at(number, function):
        def counting(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return function(*arguments)

        return counting

    functions = {name: getattr(os, name) for name in ("rename", "replace")}
    for number in itertools.count(1):
        calls = 0
        for name, function in functions.items():
            monkeypatch.setattr(os, name, interrupt_at(number, function))
        with contextlib.suppress(KeyboardInterrupt):
            train_tokenizer([str(library / "json")], out, vocab_size=300, progress=False, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["t"]
        if calls < number:
            break
        assert tree(out) == before
    assert number > 2 and load_encoder(out).vocab_size == 300
    assert tree(out).keys() == before.keys()


def test_folders_of_something_else_are_left_alone(library, tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder" / "thesis.txt"):
        path.write_text("all of it")
    for name, reason in (("file", "is a file"), ("folder", "holds thesis.txt, which is no part of a tokenizer")):
        with pytest.raises(DataError, match=f"{name} {reason}; give a folder"):
            train_tokenizer([str(library / "json")], tmp_path / name, vocab_size=300, progress=False, overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "all of it"


def test_the_command_trains_the_same_tokenizer_again(library, tokenizer_folder, tmp_path):
    inputs = [str(library / name) for name in ("email", "asyncio", "json")]
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *inputs, "--quiet", "--out", str(tmp_path / "t")]
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    done = subprocess.run([*command, "--vocab-size", str(VOCAB_SIZE)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in tokenizer_folder.iterdir():
        assert (tmp_path / "t" / path.name).read_bytes() == path.read_bytes(), path.name
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_hash_survives_saving_again_but_not_other_merges(hugging_face, tokenizer_folder, library, tmp_path):
    hugging_face(["a", "b c d"], padding=True, truncation=True, max_length=2)  # sets padding in the backend
    hugging_face.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(tokenizer_folder)
    other = train_tokenizer([str(library / "json")], tmp_path / "other", vocab_size=400, progress=False)
    assert other.hash != tokenizer_hash(tokenizer_folder)


def test_max_bytes_reads_from_everywhere(library, tmp_path):
    (tmp_path / "a.txt").write_text("alpha beta " * 200_000)
    (tmp_path / "b.txt").write_text("gamma delta " * 200_000)
    encoder = train_tokenizer(
        [str(tmp_path / "*.txt")], tmp_path / "t", vocab_size=265, max_bytes=100_000, progress=False
    )
    tokens = set(encoder.fast.get_vocab())
    assert {"ta", "ha"} & tokens and any("l" in token or "m" in token for token in tokens if len(token) > 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "--vocab-size 100: .*at least 257"),
        ({"vocab_size": 60_000}, "--vocab-size 60000: the text has only .* or --vocab-size"),
        ({"inputs": ["/nowhere/at/all"]}, "/nowhere/at/all does not exist"),
    ],
)
def test_bad_training_options_are_refused(library, tmp_path, options, message):
    options = {"inputs": [str(library / "json")], "vocab_size": 300, **options}
    with pytest.raises(DataError, match=message):
        train_tokenizer(options.pop("inputs"), tmp_path / "t", progress=False, **options)
    assert not (tmp_path / "t" / "tokenizer.json").exists()


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text: its files, or all of their documents, are empty"):
        train_tokenizer([str(tmp_path / "empty.txt")], tmp_path / "t", progress=False)


def test_folders_that_are_no_byte_level_tokenizer_are_refused(tmp_path, tokenizer_folder):
    with pytest.raises(DataError, match="no tokenizer.json there"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a valid tokenizer"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="no bos_token"):
        load_encoder(tmp_path)
    words = Tokenizer(models.WordLevel({"<s>": 0, "größe": 1, "日": 2}, unk_token="<s>"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(DataError, match="not byte-level"):
        load_encoder(tmp_path)


def test_training_after_encoding_with_threads(tmp_path):
    """In a fork of such a process, training would wait forever for threads that the fork has not."""
    code = f"""
import os
from pathlib import Path
os.environ.pop("TOKENIZERS_PARALLELISM", None)
from bov_megatron.data.tokenizer import train_tokenizer
text = {str(STDLIB / "argparse.py")!r}
first = train_tokenizer([text], Path({str(tmp_path / "first")!r}), 300, progress=False)
first.fast.encode_batch_fast([Path(text).read_text()] * 64)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as other parts of the package do
train_tokenizer([text], Path({str(tmp_path / "second")!r}), 300, progress=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
