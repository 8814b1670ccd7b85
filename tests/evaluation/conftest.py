from pathlib import Path

import pytest

from bov_megatron.compat import register_missing_torchvision_ops
from bov_megatron.exchange.export import export
from tests.support.distributed import run_ranks
from tests.support.runs import overrides, train
from tests.support.small_models import VARIANTS, small_model, small_model_config
from tests.support.tiny_tokenizer import train_tiny_tokenizer

# Test modules import transformers at their head; conftest is read before them.
register_missing_torchvision_ops()

VOCAB, SEQUENCE_LENGTH = 400, 48


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`(folder, model)`: a random bank model, exported with a real tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tiny_tokenizer(folder, VOCAB)
    sizes = dict(vocab_size=VOCAB, sequence_length=SEQUENCE_LENGTH)
    model = small_model(VARIANTS["bank"], windows=None, **sizes)
    config = small_model_config(VARIANTS["bank"], **sizes)
    return export(model.state_dict(), config, tokenizer, folder / "export"), model


@pytest.fixture(scope="session")
def trained_run(prepared_data, tmp_path_factory) -> Path:
    """A trained run of two tensor-parallel ranks in bf16, with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("generation")
    changes = ["train.steps=20", "checkpoint.interval=10", "validation.interval=0", "train.precision=bf16"]
    train(2, overrides(prepared_data, folder / "run", *changes, "parallel.tensor_model_parallel_size=2"))
    return folder / "run"


@pytest.fixture(scope="session")
def trained_export(trained_run) -> Path:
    run_ranks(export_rank, 1, str(trained_run))
    return trained_run.parent / "export"


def export_rank(rank: int, world_size: int, run: str) -> None:
    from bov_megatron.exchange.convert import to_hf

    to_hf(Path(run), Path(run).parent / "export")


@pytest.fixture(scope="session")
def exact_export(trained_run, tmp_path_factory) -> Path:
    """With the run's weights as they are: in fp32."""
    folder = tmp_path_factory.mktemp("fp32") / "export"
    run_ranks(exact_export_rank, 1, trained_run, folder)
    return folder


def exact_export_rank(rank: int, world_size: int, run: Path, folder: Path) -> None:
    import torch

    from bov_megatron.exchange.convert import to_hf

    to_hf(run, folder, dtype=torch.float32)
