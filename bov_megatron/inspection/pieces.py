"""Tensors of a checkpoint, read piece by piece as they lie in its files, without a model around them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bov_megatron.errors import CheckpointError
from bov_megatron.optim.sharded_state import MAIN, PREFIX
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import table_name

EMBEDDING = "embedding.word_embeddings.weight"


class StoredTensors:
    """The tensors of the checkpoint in `path`. Raises CheckpointError where it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            metadata = FileSystemReader(path).read_metadata()
        except Exception as error:  # torch unpickles it
            raise CheckpointError(f"checkpoint {path} cannot be read ({error}); `bov checkpoint verify` it") from None
        self._shapes = {
            key: tuple(stored.size)
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._places: dict[str, list] = {}
        for index, place in (metadata.storage_data or {}).items():
            self._places.setdefault(index.fqn, []).append((tuple(index.offset or ()), place))

    def weights_key(self, key: str) -> str:
        """The key of a parameter's weights in fp32, where the model's own are in less and both are stored."""
        main = f"{PREFIX}.{MAIN}.{key}"
        return main if main in self._shapes else key

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._shapes:
            raise CheckpointError(f"checkpoint {self.path} has no tensor {key}: it is of another version or model")
        return self._shapes[key]

    def pieces(self, key: str) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first column and values of each stored piece of a matrix, in the order of rows."""
        self.shape(key)
        for offset, place in sorted(self._places[key], key=lambda item: item[0]):
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            yield offset[0], offset[1], tensor


def table_keys(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> key in a checkpoint of every value table."""
    if not model.value.facts.has_table:
        return {}
    if model.value.table == "shared":
        return {table_name(model, 0): "value_table.weight"} if model.layers_from_source() else {}
    return {
        table_name(model, layer): f"decoder.layers.{layer}.self_attention.value_source.table.weight"
        for layer in model.layers_from_source()
    }
