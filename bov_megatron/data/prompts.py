"""Texts for the model to continue, from the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bov_megatron.data.tokenizer import load_encoder
from bov_megatron.errors import RecipeError
from bov_megatron.recipe import Recipe


class Prompts:
    """`validation.prompts` as token ids, each after `<|bos|>`.

    Can be sent to other processes, which then read no tokenizer and can't decode. Raises RecipeError for a prompt that
    leaves no room for `validation.prompt_tokens`.
    """

    def __init__(self, recipe: Recipe, tokenizer_folder: Path):
        config, length = recipe.validation, recipe.model.sequence_length
        self._encoder = load_encoder(tokenizer_folder)
        self.bos_token_id = self._encoder.bos_token_id
        self.texts, self.new_tokens = config.prompts, config.prompt_tokens
        self.ids = [[self.bos_token_id, *ids.tolist()] for ids in self._encoder.encode(self.texts)]
        for number, ids in enumerate(self.ids):
            if len(ids) + self.new_tokens > length:
                raise RecipeError(
                    f"validation.prompts[{number}] has {len(ids)} tokens with <|bos|>, and validation.prompt_tokens="
                    f"{self.new_tokens} more would pass model.sequence_length={length}; shorten it, or lower "
                    "validation.prompt_tokens"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoder": None}

    def decode(self, ids: list[int]) -> str:
        """The text of a continuation, up to the end of the document."""
        if self.bos_token_id in ids:
            ids = ids[: ids.index(self.bos_token_id)]
        return self._encoder.fast.decode(ids, skip_special_tokens=True)
