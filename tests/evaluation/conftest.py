import pytest

from bov_megatron.compat import register_missing_torchvision_ops
from bov_megatron.exchange.export import export
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
