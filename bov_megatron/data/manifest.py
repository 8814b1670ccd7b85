"""`manifest.json` describes a data set. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from bov_megatron.data.files import json_bytes, write_atomically
from bov_megatron.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
WORK_NAME = ".work"
"""Of the folder in a data set that is being prepared."""
COLUMN = "tokens"


@dataclass
class SplitManifest:
    """Counts of one split. `bytes` are UTF-8 bytes of the documents' text."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    """Tokens stored, `<|bos|>` included: samples * (sequence_length + 1)."""
    dropped_tokens: int = 0
    """Remainder of the split that didn't fill a sample."""
    samples: int = 0
    shards: int = 0
    index_sha256: str = ""


@dataclass
class Manifest:
    """Contents of a data set and the options it was made with."""

    sequence_length: int
    vocab_size: int
    dtype: str
    """`uint16` or `uint32`."""
    bos_token_id: int
    tokenizer_hash: str
    tokenizer_files: list[str]
    """Names, in the folder `tokenizer`."""
    splits: dict[str, SplitManifest]
    validation_fraction: float
    seed: int
    """For the choice of held-out documents."""
    inputs: list[str] = field(default_factory=list)
    validation_inputs: list[str] = field(default_factory=list)
    empty_documents: int = 0
    invalid_documents: int = 0
    """Left out because they weren't valid UTF-8."""
    bad_rows: int = 0
    """Left out with `--skip-bad`; `bad_rows.jsonl` lists them."""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST_NAME, json_bytes(dataclasses.asdict(self)))


def read_manifest(folder: Path) -> Manifest:
    """Read a data set's manifest. Raises DataError if it is missing, of another version or damaged."""
    path = folder / MANIFEST_NAME
    if folder.is_file():
        raise DataError(f"{folder} is a file, not a data set; {_make_one(folder)}")
    if not folder.is_dir():
        raise DataError(f"data set {folder} does not exist; prepare it with `bov prepare-data`")
    if not path.is_file() and not any((folder / name).exists() for name in (WORK_NAME, "tokenizer", *SPLITS)):
        raise DataError(f"folder {folder} holds no data set: it has no {MANIFEST_NAME}; {_make_one(folder)}")
    if not path.is_file():
        raise DataError(
            f"data set {folder} has no {MANIFEST_NAME}, so it is not complete; "
            "run `bov prepare-data` again with the same arguments to finish it"
        )
    try:
        values = json.loads(path.read_bytes())
        if values.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {values.get('format_version')}, this program reads {FORMAT_VERSION}; "
                "prepare the data again"
            )
        values["splits"] = {name: SplitManifest(**split) for name, split in values["splits"].items()}
        return Manifest(**values)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a data set's manifest: {error}") from None


def _make_one(text: Path) -> str:
    return f"make one of text with `bov prepare-data {text} --tokenizer TOKENIZER --out DATA`, and give data.path=DATA"
