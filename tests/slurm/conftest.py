"""One Slurm cluster and one small prepared data set for all tests of this folder."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from bov_megatron.data.prepare import PrepareOptions, prepare_data
from bov_megatron.data.tokenizer import train_tokenizer
from tests.support.cluster import ClusterUnavailable, SlurmCluster, install_slurm

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster():
    """A running two-node cluster; the tests are skipped, saying why, where none can be had."""
    try:
        install_slurm()
    except ClusterUnavailable as error:
        pytest.skip(str(error))
    with SlurmCluster() as running:
        yield running
    assert running.processes() == [], "the cluster left processes behind"


@pytest.fixture(scope="session")
def slurm_data(tmp_path_factory) -> Path:
    """Text of the standard library, prepared for the smoke recipe."""
    folder = tmp_path_factory.mktemp("slurm_data")
    text = [str(Path(sysconfig.get_path("stdlib"), package)) for package in ("email", "json", "asyncio")]
    train_tokenizer(text, str(folder / "tokenizer"), vocab_size=4096, progress=False)
    options = PrepareOptions(
        text, str(folder / "tokenizer"), str(folder / "data"), sequence_length=256, validation_fraction=0.05, workers=1
    )
    prepare_data(options, progress=False)
    return folder / "data"


@pytest.fixture
def job_environ(tmp_path) -> dict[str, str]:
    """What a user exports before sbatch: this Python, the smoke recipe, runs in a folder of the test's own."""
    return {
        "BOV_PYTHON": sys.executable,
        "BOV_RECIPE": "recipes/smoke.yaml",
        "BOV_OUTPUT_DIR": str(tmp_path / "runs"),
        "TMPDIR": str(tmp_path),
        "BOV_REQUEUE": "0",  # tests of failures want to see them; those of restarts set it
    }


def read_metrics(run_dir: Path) -> list[dict]:
    """Training lines of a run's metrics.jsonl, in order."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]
