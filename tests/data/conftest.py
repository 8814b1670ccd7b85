"""Real text (the running Python's own library), a real tokenizer and real shards, made once per test run."""

import sysconfig
from pathlib import Path

import pytest

from bov_megatron.data.prepare import PrepareOptions, prepare_data
from bov_megatron.data.tokenizer import load_encoder, train_tokenizer

SEQUENCE_LENGTH = 128
VOCAB_SIZE = 2048


@pytest.fixture(scope="session")
def library() -> Path:
    """The standard library's folder."""
    return Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def tokenizer_folder(library, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    inputs = [str(library / name) for name in ("email", "asyncio", "json")]
    train_tokenizer(inputs, folder, vocab_size=VOCAB_SIZE, progress=False)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder):
    return load_encoder(tokenizer_folder)


def prepare(inputs, tokenizer: Path, out: Path, **options):
    options = {"sequence_length": SEQUENCE_LENGTH, "workers": 1, "unit_bytes": 100_000, **options}
    return prepare_data(
        PrepareOptions([str(path) for path in inputs], str(tokenizer), str(out), **options), progress=False
    )


@pytest.fixture(scope="session")
def data_folder(library, tokenizer_folder, tmp_path_factory) -> Path:
    """A data set of several units, each of several shards."""
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(
        [library / "email", library / "asyncio"], tokenizer_folder, out, validation_fraction=0.1, shard_bytes=20_000
    )
    return out


@pytest.fixture(scope="session")
def other_data_folder(library, tokenizer_folder, tmp_path_factory) -> Path:
    """Another one of the same tokenizer."""
    out = tmp_path_factory.mktemp("other") / "set"
    prepare([library / "json", library / "unittest"], tokenizer_folder, out, validation_fraction=0.1)
    return out
