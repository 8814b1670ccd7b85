"""Continuations of the recipe's prompts after each validation.

The live model continues them in whatever layout it trains in, without gathering weights: for each token, one forward
pass over all prompts, padded to the same length. The time is that of `prompt_tokens` forward passes of a micro-batch
with as many sequences as there are prompts, or less where all continuations end before.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.data.prompts import Prompts
from bov_megatron.training.trainer import Callback


class Samples(Callback):
    """Adds `samples`, a list of `prompt` and `text`, and `samples_seconds` to lines with a validation. A run that must
    stop leaves them out."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts
        self.length = max(map(len, prompts.ids)) + prompts.new_tokens

    def after_step(self, trainer, record):
        if "validation_bits_per_byte" in record:
            self._add(trainer, record)

    def after_line(self, trainer, line):
        self.after_step(trainer, line)

    def _add(self, trainer, record: dict[str, Any]) -> None:
        started = time.perf_counter()
        if (continuations := self._continue(trainer)) is None:
            return
        if dist.get_rank() == 0:  # which writes the line, and has the tokenizer
            record["samples"] = [
                {"prompt": prompt, "text": self.prompts.decode(ids)}
                for prompt, ids in zip(self.prompts.texts, continuations, strict=True)
            ]
        record["samples_seconds"] = time.perf_counter() - started

    def _continue(self, trainer) -> list[list[int]] | None:
        """The continuations' ids, the same on every rank; None where the run must stop; collective."""
        bos = self.prompts.bos_token_id
        begins = torch.tensor([len(ids) for ids in self.prompts.ids])
        ids_BT = torch.full((len(begins), self.length), bos)
        for row, ids in zip(ids_BT, self.prompts.ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        ended = torch.zeros(len(begins), dtype=torch.bool)
        for done in range(self.prompts.new_tokens):
            if trainer.must_stop():
                return None
            next_B = trainer.engine.next_logits(ids_BT, begins + done).argmax(dim=1)
            # Data-parallel ranks may round differently, and must go on and end together.
            dist.broadcast(next_B, 0)
            ids_BT[torch.arange(len(begins)), begins + done] = next_B.cpu()
            ended |= next_B.cpu() == bos
            if ended.all():
                break
        stop = begins + done + 1
        return [row[begin:end].tolist() for row, begin, end in zip(ids_BT, begins, stop, strict=True)]
