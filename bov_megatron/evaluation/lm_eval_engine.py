"""lm-eval on an engine, so on a checkpoint in any layout. Imports lm-eval, which takes seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state

from bov_megatron.data.tokenizer import Encoder
from bov_megatron.engines.base import Engine
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.core.prompts import Option
from bov_megatron.evaluation.core.scorers import EngineScorer

DEFAULT_NEW_TOKENS = 256


def generation_options(options: dict[str, Any], context: int) -> dict[str, Any]:
    """A task's settings for generating, completed. Raises EvaluationError for those that an engine can't follow."""
    options = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
    if options.get("do_sample") or options.get("temperature"):
        raise EvaluationError("a task samples its answers, which an engine can't; evaluate an export instead")
    limit = options["max_gen_toks"]
    if limit >= context:
        raise EvaluationError(
            f"a task wants up to {limit} new tokens, and the model takes {context} in all; pass a task with a smaller "
            "max_gen_toks"
        )
    return options


class EngineLM(TemplateLM):
    """Every rank asks for all requests and gets all results; the data-parallel ranks share the work.

    To lm-eval it is one process, because lm-eval's own sharding doesn't know ranks that share a model.

    Args:
        batch_size: sequences in a forward pass of a model replica.
        bos: start prompts with `<|bos|>`.
        between: called by all ranks together between forward passes; may raise, on all of them, to end the evaluation.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        batch_size: int,
        bos: bool,
        between: Callable[[], object] = lambda: None,
    ):
        super().__init__()
        self.engine, self.encoder, self.batch_size, self.bos = engine, encoder, batch_size, bos
        self._between = between
        self.context = engine.recipe.model.sequence_length
        self._scorer = EngineScorer(engine)

    @property
    def eot_token_id(self) -> int:
        return self.encoder.bos_token_id  # stands between documents

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        return self.encoder.encode([string])[0].tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return [self.prefix_token_id] * self.bos + context_ids, continuation_ids

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **options: Any) -> list[tuple[float, bool]]:
        # The last token is only predicted, so one more fits than the model takes.
        sequences = [(context + scored)[-self.context - 1 :] for _, context, scored in requests]
        starts = [max(len(ids) - len(request[2]), 1) for ids, request in zip(sequences, requests, strict=True)]

        def score(numbers: Sequence[int]) -> list[tuple[float, bool]]:
            options = [Option(sequences[number], starts[number]) for number in numbers]
            scores = self._scorer.options(options, min(option.start for option in options))
            return [(-score.nats, score.is_greedy) for score in scores]

        # By context before length: requests with the same one come together, and what is not scored is computed once.
        order = [(start, ids[: start - 1], len(ids)) for ids, start in zip(sequences, starts, strict=True)]
        return self._share(order, score)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.context,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(value for value, _ in itertools.islice(scores, len(of_text))) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, limits, stops = [], [], []
        for request in requests:
            text, options = request.args
            options = generation_options(options, self.context)
            limit = options["max_gen_toks"]
            ids = [self.prefix_token_id] * self.bos + self.tok_encode(text)
            prompts.append(ids[-(self.context - limit) :] or [self.prefix_token_id])
            limits.append(limit)
            stops.append(handle_stop_sequences(options.get("until"), eos=None))
        return self._share(
            [len(ids) for ids in prompts],
            lambda numbers: self._continue(
                [prompts[n] for n in numbers], [limits[n] for n in numbers], [stops[n] for n in numbers]
            ),
        )

    def _continue(self, prompts: list[list[int]], limits: list[int], stops: list[list[str]]) -> list[str]:
        """Greedy continuations, each up to its limit, a stop sequence or the document's end."""
        lengths_B = torch.tensor([len(ids) for ids in prompts])
        ids_BT = torch.full((len(prompts), int((lengths_B + torch.tensor(limits)).max())), self.eot_token_id)
        for row, ids in zip(ids_BT, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        texts: list[str | None] = [None] * len(prompts)
        prefix = self.engine.prefix(ids_BT, int(lengths_B.min()) - 1)
        done = 0
        while None in texts:
            done += 1
            next_B = self.engine.next_logits(ids_BT[:, : lengths_B.max()], lengths_B, prefix).argmax(dim=1).cpu()
            # A row that has ended stays as it is.
            open_B = torch.tensor([text is None for text in texts])
            ids_BT[torch.arange(len(prompts))[open_B], lengths_B[open_B]] = next_B[open_B]
            lengths_B += open_B.long()
            for row in open_B.nonzero().flatten().tolist():
                new = ids_BT[row, len(prompts[row]) : int(lengths_B[row])].tolist()
                ended = new[-1] == self.eot_token_id
                text = self.encoder.fast.decode(new, skip_special_tokens=True)
                if ended or done == limits[row] or any(stop in text for stop in stops[row] if stop):
                    texts[row] = postprocess_generated_text(text, stops[row], None)
        return [text or "" for text in texts]

    def _share(self, sizes: Sequence[Any], compute) -> list:
        """`compute(numbers)` of requests of about the same size, in batches that the data-parallel ranks share; the
        results of all of them, in order, on every rank."""
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)  # the largest come first
        all_batches = [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
        group = parallel_state.get_data_parallel_group()
        own = {}
        for begin in range(0, len(all_batches), group.size()):
            self._between()
            together = all_batches[begin : begin + group.size()]
            # A rank without a batch does another's: under ZeRO 3, all ranks gather the weights of a forward pass.
            batch = together[min(group.rank(), len(together) - 1)]
            own[tuple(batch)] = compute(batch)
        gathered: list[dict] = [{}] * group.size()
        dist.all_gather_object(gathered, own, group=group)
        results: list = [None] * len(sizes)
        for part in gathered:
            for batch, values in part.items():
                for number, value in zip(batch, values, strict=True):
                    results[number] = value
        return results
