"""A real, small tokenizer, trained on sources of the standard library."""

import textwrap
from pathlib import Path

from bov_megatron.data.tokenizer import train_tokenizer

STDLIB = Path(textwrap.__file__).parent


def train_tiny_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """Train on a few modules; returns the tokenizer folder."""
    inputs = [str(STDLIB / f"{name}.py") for name in ("textwrap", "argparse", "heapq")]
    train_tokenizer(inputs, folder / "tokenizer", vocab_size=vocab_size, progress=False)
    return folder / "tokenizer"
