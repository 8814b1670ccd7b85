"""Losses of questions, from a transformers model or from an engine in any layout.

Shapes: B sequences, S positions, P shared prefixes, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bov_megatron.evaluation.core.prompts import Option, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bov_megatron.engines.base import Engine


@dataclass(frozen=True)
class OptionScore:
    nats: float
    """Sum over the scored tokens."""
    is_greedy: bool
    """Whether every scored token is the most probable one."""


class Scorer(Protocol):
    def score(self, questions: Sequence[Question]) -> list[list[OptionScore]]:
        """Scores of each question's options, computed together."""


class TransformersScorer:
    """A transformers model, on the device to use. What a question's options begin with is computed once."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()

    @torch.no_grad()
    def score(self, questions: Sequence[Question]) -> list[list[OptionScore]]:
        """See Scorer."""
        options = [option for question in questions for option in question.options]
        if len(options) > len(questions) and all(question.shared for question in questions):
            scores = self._behind_prefixes(questions, options)
        else:
            scores = self._whole(options)
        return _by_question(scores, questions)

    def _whole(self, options: Sequence[Option]) -> list[OptionScore]:
        """One forward pass over everything. Padding is on the left, so that scored tokens stand at the end."""
        ids_BS, mask_BS = self._padded([option.ids for option in options], left=True)
        kept = 1 + max(len(option.scored) for option in options)
        logits_BSV = self.model(ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=kept).logits
        nats_BS, greedy_BS = _token_scores(logits_BSV[:, :-1], ids_BS[:, 1 - kept :])
        return [_sum(nats[-len(o.scored) :], greedy[-len(o.scored) :]) for o, nats, greedy in
                zip(options, nats_BS, greedy_BS, strict=True)]  # fmt: skip

    def _behind_prefixes(self, questions: Sequence[Question], options: Sequence[Option]) -> list[OptionScore]:
        """Two passes: the prefixes, then what each option adds to its own, from the cache."""
        shared = [question.shared for question in questions for _ in question.options]
        prefix_of = [number for number, question in enumerate(questions) for _ in question.options]
        ids_PS, mask_PS = self._padded(
            [question.options[0].ids[: question.shared] for question in questions], left=True
        )
        prefixes = self.model(ids_PS, attention_mask=mask_PS, use_cache=True, logits_to_keep=1)
        rows = torch.tensor(prefix_of, device=ids_PS.device)
        cache = prefixes.past_key_values
        cache.batch_select_indices(rows)
        ids_BS, mask_BS = self._padded([o.ids[begin:] for o, begin in zip(options, shared, strict=True)], left=False)
        added = self.model(ids_BS, attention_mask=torch.cat([mask_PS[rows], mask_BS], dim=1), past_key_values=cache)
        # Its prefix's last token predicts an option's first.
        logits_BSV = torch.cat([prefixes.logits[rows], added.logits[:, :-1]], dim=1)
        nats_BS, greedy_BS = _token_scores(logits_BSV, ids_BS)
        return [
            _sum(nats[o.start - begin : len(o.ids) - begin], greedy[o.start - begin : len(o.ids) - begin])
            for o, begin, nats, greedy in zip(options, shared, nats_BS, greedy_BS, strict=True)
        ]

    def _padded(self, sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, S]`."""
        rows = [torch.tensor(ids, device=self.model.device) for ids in sequences]
        masks = [torch.ones_like(ids) for ids in rows]
        side = "left" if left else "right"
        ids_BS, mask_BS = (
            torch.nn.utils.rnn.pad_sequence(r, batch_first=True, padding_side=side) for r in (rows, masks)
        )
        return ids_BS, mask_BS


class EngineScorer:
    """An engine, whose ranks of one model replica all score the same questions; collective over them. What options
    begin with is computed once."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def score(self, questions: Sequence[Question]) -> list[list[OptionScore]]:
        """See Scorer."""
        options = [option for question in questions for option in question.options]
        shared = min(question.shared for question in questions)
        return _by_question(self.options(options, max(shared, 1)), questions)

    def options(self, options: Sequence[Option], shared: int) -> list[OptionScore]:
        """Scores of options, none of which is scored on its first `shared` tokens, at least 1."""
        ids_BS = torch.nn.utils.rnn.pad_sequence([torch.tensor(option.ids) for option in options], batch_first=True)
        nats_BS, greedy_BS = self.engine.token_scores(ids_BS, shared)
        return [
            _sum(nats[o.start - shared : len(o.ids) - shared], greedy[o.start - shared : len(o.ids) - shared])
            for o, nats, greedy in zip(options, nats_BS, greedy_BS, strict=True)
        ]


def _token_scores(logits_BSV: Tensor, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each token, and whether it is the most probable one; `logits_BSV[:, s]` predict `ids_BS[:, s]`."""
    nats_BS = torch.nn.functional.cross_entropy(logits_BSV.float().transpose(1, 2), ids_BS, reduction="none")
    return nats_BS, logits_BSV.argmax(dim=-1) == ids_BS


def _sum(nats_S: Tensor, greedy_S: Tensor) -> OptionScore:
    return OptionScore(nats_S.double().sum().item(), bool(greedy_S.all()))


def _by_question(scores: Sequence[OptionScore], questions: Sequence[Question]) -> list[list[OptionScore]]:
    rest = iter(scores)
    return [list(itertools.islice(rest, len(question.options))) for question in questions]
