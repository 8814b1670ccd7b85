"""Continuing texts with a trained model: an export, or a run's checkpoint loaded as the model that it exports to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from bov_megatron.data.tokenizer import Encoder
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.target import find_target


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises EvaluationError for values that mean nothing."""

    temperature: float = 0.0
    """0 is greedy: always the most probable token."""
    top_k: int = 0
    """Choose among so many of the most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that have this share of the probability together."""
    seed: int | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise EvaluationError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise EvaluationError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise EvaluationError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.seed is not None):
            raise EvaluationError(
                "--top-k, --top-p and --seed choose among tokens, and --temperature 0 always takes the most probable "
                "one; give --temperature as well, e.g. 0.8"
            )

    def options(self) -> dict[str, Any]:
        """Of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True)
class Generation:
    prompt: str
    text: str
    """The continuation."""
    tokens: int
    seconds: float
    ended_by: Literal["end of document", "length"]


class Generator:
    """A model with its tokenizer.

    Args:
        target: folder of an export, run folder (its newest checkpoint, or that of `step`), or one checkpoint's folder.
        device: None means a GPU if there is one.
        dtype: `auto` is that of the export, or that in which the run computed.
        bank_device: where value tables are: None (on `device`), `cpu`, or of an export `mmap`.

    Raises EvaluationError or CheckpointError where there is no model, DataError without a tokenizer.
    """

    def __init__(
        self,
        target: Path,
        step: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        bank_device: str | None = None,
    ):
        found = find_target(target, step)
        self.source = str(found.folder)
        self.encoder: Encoder = found.encoder()
        self.model = found.load(device, dtype, bank_device)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        on_text: Callable[[str], object] = lambda text: None,
    ) -> Generation:
        """Continue `prompt` until the document ends, or by `max_new_tokens` tokens, or to the end of the context.

        `on_text` gets the continuation piece by piece as it arrives. Raises EvaluationError for a prompt that fills the
        context.
        """
        sampling = sampling or Sampling()
        bos, context = self.encoder.bos_token_id, self.model.config.max_position_embeddings
        ids = [bos, *self.encoder.encode([prompt])[0].tolist()]
        if len(ids) >= context:
            raise EvaluationError(
                f"the prompt has {len(ids)} tokens with <|bos|>, and the model was trained on {context}: shorten it"
            )
        if max_new_tokens < 1:
            raise EvaluationError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        streamer = _Streamer(self.encoder, on_text)
        input_ids = torch.tensor([ids], device=self.model.device)
        started = time.perf_counter()
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, context - len(ids)),
            bos_token_id=bos,
            eos_token_id=bos,
            pad_token_id=bos,
            streamer=streamer,
            **sampling.options(),
        )
        new = output[0, len(ids) :].tolist()
        return Generation(
            prompt,
            "".join(streamer.pieces),
            len(new),
            time.perf_counter() - started,
            "end of document" if new[-1] == bos else "length",
        )


class _Streamer(BaseStreamer):
    """Passes text on as soon as its characters are complete: a character may be several tokens."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]):
        from tokenizers.decoders import DecodeStream

        self._fast, self._on_text, self._decoder = encoder.fast, on_text, DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self.pieces: list[str] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._ids.append(token)
            self._emit(self._decoder.step(self._fast, token))

    def end(self) -> None:
        # Bytes of a character that was cut off by the length.
        whole = self._fast.decode(self._ids, skip_special_tokens=True)
        self._emit(whole[len("".join(self.pieces)) :])

    def _emit(self, text: str | None) -> None:
        if text:
            self.pieces.append(text)
            self._on_text(text)
