"""The decoder of arXiv 2606.02780 on Megatron-core's GPTModel: smear, weightless norms, soft-capped logits and value
sources.

Shapes: B batch, S sequence, s this context-parallel rank's part of it (all of it without context parallelism),
H hidden, V vocabulary (padded), T tensor-parallel ranks.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from torch import Tensor

from bov_megatron.model import context_parallel
from bov_megatron.model.attention import rotary_cos_sin
from bov_megatron.model.bank import lookup_ahead
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.model.linear import load_without_extra_state, without_extra_state
from bov_megatron.model.naming import local_parameters
from bov_megatron.model.norm import normalise
from bov_megatron.model.output import OutputLayer
from bov_megatron.model.prefix import Prefix, first_position
from bov_megatron.model.spec import block_spec, transformer_config
from bov_megatron.parallel.device import device, to_device
from bov_megatron.parallel.regions import region
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.fields import SMEAR_CHANNELS


class Smear(torch.nn.Module):
    """Adds the previous token: `x[t] += scale · sigmoid(gate · x[t, :24]) · x[t-1]`, t ≥ 1.

    Runs before sequence parallelism splits the sequence, so that no rank needs another's token.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.empty(1, SMEAR_CHANNELS, dtype=dtype, device=device()))
        self.scale = torch.nn.Parameter(torch.empty(1, dtype=dtype, device=device()))

    def forward(self, x_SBH: Tensor) -> Tensor:
        return _smear(x_SBH, self.gate, self.scale)


@region
def _smear(x_SBH: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    opening = torch.sigmoid(F.linear(x_SBH[1:, :, :SMEAR_CHANNELS], gate))
    return torch.cat((x_SBH[:1], x_SBH[1:] + scale * opening * x_SBH[:-1]))


class BovModel(GPTModel):
    """The decoder, or a pipeline stage or model chunk of it.

    Weights are uninitialised: call model.initialization.initialize_weights, or load a checkpoint.

    Args:
        recipe: the run.
        pre_process: whether this stage embeds tokens.
        post_process: whether this stage computes logits.
        vp_stage: number of the model chunk in an interleaved pipeline.
    """

    def __init__(
        self, recipe: Recipe, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ):
        config = transformer_config(recipe)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(recipe, config, vp_stage),
            vocab_size=recipe.padded_vocab_size(),
            max_sequence_length=recipe.model.sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="none",  # rotary angles come from rotary_cos_sin
            scatter_embedding_sequence_parallel=False,  # smear needs whole sequences
            vp_stage=vp_stage,
        )
        self.recipe = recipe
        if pre_process:
            self.smear = Smear(config.params_dtype)
        if post_process:
            self.output_layer = OutputLayer(
                config, recipe.model.vocab_size, self.vocab_size, recipe.model.logit_softcap, self.pg_collection.tp
            )
            self.setup_embeddings_and_output_layer()  # once more, for this output layer
        self.value_table = None
        if recipe.model.value.table == "shared" and recipe.model.value.facts.has_table:
            self.value_table = ValueTable(recipe.model, self.vocab_size, config.params_dtype, self.pg_collection.tp)
        self.tables_ahead = [module for module in self.modules() if isinstance(module, ValueTable) and module.ahead]
        """Tables whose rows are sent at the decoder's start, ahead of their layers."""
        self.local_parameters = local_parameters(self)
        load_without_extra_state(self)

    def forward(self, ids_BS: Tensor, labels_Bs: Tensor | None = None, prefix: Prefix | None = None) -> Tensor:
        """One micro-batch through this stage.

        Args:
            ids_BS: token ids of whole sequences, on all stages; preferably on the CPU (see lookup_ahead.py).
            labels_Bs: next tokens of this context-parallel rank's positions.
            prefix: what the sequences begin with. In the pass that fills it in, no stage computes logits; in others,
                s are positions behind it.

        Returns:
            Before the last stage: hidden states `[s, B, H]`. On the last: loss per token in nats `[B, s]`, or
            without labels soft-capped fp32 logits of this rank's vocabulary `[B, s, V/T]`.
        """
        model, group = self.recipe.model, self.pg_collection.cp
        first = first_position(prefix)
        with self._lookups_ahead(context_parallel.take(ids_BS, 1, group, first)) as ticket:
            ids_BS = to_device(ids_BS)
            hidden = self._embed(ids_BS, first) if self.pre_process else None
            carried = (
                self._carried(context_parallel.take(ids_BS, 1, group, first), hidden) if ticket is None else ticket
            )
            positions_s = context_parallel.positions(ids_BS.size(1), group, ids_BS.device, first)
            hidden = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                context=carried,
                rotary_pos_emb=rotary_cos_sin(positions_s, model.kv_channels, model.rotary_base),
                inference_context=prefix,
            )
        if not self.post_process or (prefix is not None and not prefix.is_complete):
            return hidden
        return self.output_layer(hidden, labels_Bs)

    def sharded_state_dict(self, *args, **options) -> dict:
        """Weights for megatron.core.dist_checkpointing, the same for all implementations of linear layers."""
        return without_extra_state(super().sharded_state_dict(*args, **options))

    def _embed(self, ids_BS: Tensor, first: int) -> Tensor:
        """The decoder's input x0, `[s, B, H]`, or this rank's chunk of it under sequence parallelism."""
        # Smear reads the previous token, so a chunk that starts inside the sequence is embedded with the one before.
        group = self.pg_collection.cp
        held = context_parallel.stretches(ids_BS.size(1), group.rank(), group.size(), first)
        before = [min(start, 1) for start, _ in held]
        ids = torch.cat([ids_BS[:, start - n : stop] for n, (start, stop) in zip(before, held, strict=True)], dim=1)
        x = normalise(self.embedding(input_ids=ids, position_ids=None))
        parts = x.split([n + stop - start for n, (start, stop) in zip(before, held, strict=True)])
        x_sBH = torch.cat([self.smear(part)[n:] for n, part in zip(before, parts, strict=True)])
        if self.config.sequence_parallel:
            x_sBH = scatter_to_sequence_parallel_region(x_sBH, group=self.pg_collection.tp)
        return x_sBH

    def _lookups_ahead(self, ids_Bs: Tensor) -> contextlib.AbstractContextManager[Tensor | None]:
        """Start this stage's lookups ahead of their layers; yields their ticket, or None where there are none."""
        if not self.tables_ahead:
            return contextlib.nullcontext()
        readers = 1 if self.value_table is None else len(self.recipe.model.layers_from_source())
        return lookup_ahead.started(ids_Bs, self.tables_ahead, readers)

    def _carried(self, ids_Bs: Tensor, x0: Tensor | None) -> Tensor | None:
        """Megatron's `context` for the first layer, without lookups ahead; see sources.py."""
        facts = self.recipe.model.value.facts
        if facts.has_table:
            return ids_Bs if self.value_table is None else self.value_table(ids_Bs)
        return x0 if facts.reads == "embedding" else None
