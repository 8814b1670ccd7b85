"""What tests of several parts share: a small prepared data set of real text."""

import os
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch is imported, and for all that tests start: pytest's workers keep all cores busy, and threads of small
# models wait for each other most of the time, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")


TESTS = Path(__file__).parent
LONG_FILES = (
    "engines/test_parallel_parity.py",
    "engines/test_deepspeed.py",
    "slurm/test_study.py",
    "checkpoint/test_resharding.py",
    "slurm/test_slurm.py",
    "engines/test_traps.py",
    "training/test_evaluation.py",
    "evaluation/test_core.py",
    "training/test_rollback.py",
    "lifecycle/test_ctrl_c.py",
    "studies/test_local.py",
    "training/test_resume.py",
    "slurm/test_evaluate.py",
    "benchmarks/test_bench.py",
    "tools/test_install.py",
    "checkpoint/test_engine_interchange.py",
    "exchange/test_transformers5.py",
    "data/test_prepare.py",
)
"""Half a minute and more each."""


def pytest_collection_modifyitems(items):
    """Long files first: workers take whole files in this order, and end together if the last ones are short."""
    place = {TESTS / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@dataclass(frozen=True)
class PreparedData:
    """A data folder as tools/prepare_data.py writes it, with the tokenizer it was made with."""

    folder: Path
    tokenizer: Path
    vocab_size: int
    sequence_length: int

    def overrides(self) -> list[str]:
        """A recipe's fields that must fit the data."""
        return [
            f"data.path={self.folder}",
            f"model.vocab_size={self.vocab_size}",
            f"model.sequence_length={self.sequence_length}",
        ]


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory) -> PreparedData:
    """Packages of the running Python's library, 512 tokens of vocabulary, samples of 256 tokens; seconds to make."""
    return prepare_library(tmp_path_factory.mktemp("prepared"), ("json", "logging", "email"), ("json", "logging"))


@pytest.fixture(scope="session")
def other_prepared_data(tmp_path_factory) -> PreparedData:
    """The same sizes from other text, with another tokenizer."""
    return prepare_library(tmp_path_factory.mktemp("other"), ("unittest",), ("unittest",))


def prepare_library(folder: Path, packages: tuple[str, ...], tokenizer_packages: tuple[str, ...]) -> PreparedData:
    from bov_megatron.data.prepare import PrepareOptions, prepare_data
    from bov_megatron.data.tokenizer import train_tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    made = PreparedData(folder / "data", folder / "tokenizer", 512, 256)
    train_tokenizer(
        [str(library / name) for name in tokenizer_packages], made.tokenizer, vocab_size=made.vocab_size, progress=False
    )
    options = PrepareOptions(
        [str(library / name) for name in packages],
        str(made.tokenizer),
        str(made.folder),
        sequence_length=made.sequence_length,
        validation=[str(library / "wsgiref")],  # small files: special tokens among the first samples
        workers=1,
        shard_bytes=50_000,
    )
    prepare_data(options, progress=False)
    return made


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
