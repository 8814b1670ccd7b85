"""The exported Bank-of-Values decoder (arXiv 2606.02780). Ships with the export, so it imports only torch,
transformers, safetensors (which transformers needs) and its configuration.

With `value_source="bank"`, an attention value in a target layer is the row of a table for the token's id. Such layers
don't cache values; the token ids are cached once for all of them.

Shapes: B batch, S new positions, T positions seen so far (cached and new), C hidden size, H attention heads,
G key/value heads, D head size, K columns of a projection (heads · D).
"""

import os
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_bov import BovConfig

logger = logging.get_logger(__name__)

SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
# What generation calls the cache, in what it passes and in what it reads from outputs; `cache` since transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def rms_norm(x):
    """RMSNorm over the last dimension, without weight; eps is the machine epsilon of the dtype."""
    return F.rms_norm(x, (x.size(-1),))


def attention_weights(q_BHSD, k_BGTD, mask, is_causal):
    """The softmax inside `scaled_dot_product_attention`, `[B, H, S, T]`, for `output_attentions`."""
    k_BHTD = k_BGTD.repeat_interleave(q_BHSD.size(1) // k_BGTD.size(1), dim=1)
    scores_BHST = q_BHSD @ k_BHTD.transpose(-1, -2) * q_BHSD.size(-1) ** -0.5
    if is_causal:
        mask = torch.ones_like(scores_BHST, dtype=torch.bool).tril()
    if mask is not None:
        scores_BHST = scores_BHST.masked_fill(~mask, float("-inf"))
    return scores_BHST.softmax(-1)


class BovCacheLayer(DynamicLayer):
    """A cache layer whose values may differ from its keys in shape and dtype, and may be zero wide."""

    def lazy_initialization(self, key_states, value_states=None):
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values


class BovCache(DynamicCache):
    """One cache layer per decoder layer, and a last one whose keys are the token ids, int32 `[B, 1, T, 1]`.

    Bank layers look up their values by these ids and cache values of width 0; the smear needs the previous id. As a
    layer of the cache, the ids are reordered, repeated and cropped together with the keys.
    """

    def __init__(self, config):
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [BovCacheLayer() for _ in range(config.num_hidden_layers + 1)]
        # Rows of tables that are not on the device, for the next step; see BovContext.look_up.
        self.rows: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def update_ids(self, ids_BS):
        """Append ids; returns all of them, `[B, T]`."""
        keys = ids_BS.to(torch.int32)[:, None, :, None]
        ids_B1T1, _ = self.layers[-1].update(keys, keys[..., :0])
        return ids_B1T1[:, 0, :, 0]


class BovTable(nn.Module):
    """A value table that is no plain embedding: not on the model's device (`config.bank_device`), or of int8 rows with
    a scale each (`config.table_dtype`).

    `weight` is `[V, K]`; with int8, `row_scale` is `[V, 1]`. With a `bank_device` they are neither parameters nor
    buffers, so that `to`, `device_map` and optimizers pass them by; `state_dict` has them. They keep the dtype they are
    stored in; rows that are looked up are converted.
    """

    def __init__(self, num_rows, num_columns, bank_device, is_int8):
        super().__init__()
        self.bank_device, self.is_int8 = bank_device, is_int8
        self.shapes = {"weight": (num_rows, num_columns)} | ({"row_scale": (num_rows, 1)} if is_int8 else {})
        self.outside: dict[str, torch.Tensor] = {}
        self.file = None  # that those outside are mapped from
        if bank_device is None:
            self.register_buffer("weight", torch.zeros(self.shapes["weight"], dtype=torch.int8))
            self.register_buffer("row_scale", torch.ones(self.shapes["row_scale"]))

    def forward(self, ids_N, like):
        """Rows of the ids with the device and dtype of `like`, `[N, K]`."""
        tensors = self.outside if self.bank_device else dict(self.named_buffers())
        if not tensors:
            raise ValueError(
                f"a value table with bank_device={self.bank_device!r} has no rows yet: load the model with "
                "from_pretrained (or with load_state_dict, if it is 'cpu')"
            )
        if self.training and torch.is_grad_enabled():
            logger.warning_once("value tables in int8 or with a bank_device are not trained, the rest is")

        def rows(name):
            return tensors[name][ids_N.to(tensors[name].device)].to(like)

        return rows("weight") * rows("row_scale") if self.is_int8 else rows("weight")

    def set_outside(self, name, tensor, file=None):
        """Take `weight` or `row_scale`: a copy, or with `mmap` this tensor, which is mapped from `file`."""
        if tensor.shape != self.shapes[name] or (tensor.dtype == torch.int8) != (self.is_int8 and name == "weight"):
            raise ValueError(
                f"a value table's {name} is {tensor.dtype} {list(tensor.shape)}, but the configuration says "
                f"{list(self.shapes[name])} and table_dtype={'int8' if self.is_int8 else None}"
            )
        self.file = file if self.bank_device == "mmap" else None
        self.outside[name] = tensor if self.file else tensor.detach().to("cpu", copy=True)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.outside.items()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if self.bank_device is None:
            lists = missing_keys, unexpected_keys, error_msgs
            return super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        for name in self.shapes:
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
            elif self.bank_device == "mmap":
                error_msgs.append(f"{key}: bank_device='mmap' takes tables from files alone: use from_pretrained")
            else:
                self.set_outside(name, state_dict[key])
        return None


def make_table(config):
    sizes = config.vocab_size, config.num_key_value_heads * config.head_dim
    if config.bank_device is None and config.table_dtype is None:
        return nn.Embedding(*sizes)
    return BovTable(*sizes, config.bank_device, is_int8=config.table_dtype == "int8")


class BovSmear(nn.Module):
    """Adds to each token a gated share of the one before it."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x_BSC, previous_BSC):
        """`previous_BSC` is the token to the left before smearing, zero where there is none."""
        return x_BSC + self.scale * torch.sigmoid(self.gate(x_BSC[..., :SMEAR_CHANNELS])) * previous_BSC


class BovAttention(nn.Module):
    """Causal attention within a window; values are `a * W_V x + b * gate * (what it reads)`, or parts of that."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.is_causal = config, True  # transformers' flash attention looks for both here
        self.layer, facts = layer, config.facts_of(layer)
        self.projects, self.reads = facts["projects"], facts["reads"]
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.qk_scale = config.head_dim, config.qk_scale
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        has_value_matrix = self.projects or self.reads == "embedding"
        self.caches_values = has_value_matrix or facts["gated"]
        if has_value_matrix:
            self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        if self.reads == "table" and config.value_table == "per_layer":
            self.value_table = make_table(config)
        self.value_gate = nn.Linear(GATE_CHANNELS, self.num_kv_heads, bias=False) if facts["gated"] else None
        # A fixed coefficient is a plain number, and no parameter.
        self.is_sum = facts["coefficients"] == 2
        a: nn.Parameter | float = 1.0
        b: nn.Parameter | float = 1.0
        if config.value_coefficient == "learned" and facts["coefficients"]:
            b = nn.Parameter(torch.zeros(1) if self.is_sum else torch.ones(1))
            a = nn.Parameter(torch.ones(1)) if self.is_sum else 1.0
        elif self.is_sum:
            a = b = 0.5
        self.projection_coefficient, self.source_coefficient = a, b
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x_BSC, context, cache):
        """`context` is the BovContext of this forward pass. Returns `[B, S, C]`."""
        q_BHSD = self._heads(self.q_proj(x_BSC), self.num_heads)
        k_BGSD = self._heads(self.k_proj(x_BSC), self.num_kv_heads)
        q_BHSD, k_BGSD = (rms_norm(context.rotate(x)) * self.qk_scale for x in (q_BHSD, k_BGSD))
        v_BGSD = self._values_to_cache(x_BSC, context, k_BGSD)
        k_BGTD, v_BGTD = (k_BGSD, v_BGSD) if cache is None else cache.update(k_BGSD, v_BGSD, self.layer)
        if self.layer == 0:
            context.first_values_BGTD = v_BGTD

        start, mask, is_causal = context.mask(self.layer)
        k_BGTD = k_BGTD[:, :, start:]
        v_BGTD = v_BGTD[:, :, start:] if self.caches_values else self.source_coefficient * self._read(context, start)
        if context.is_flash:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            # transformers counts the query's own position as one of the window's.
            options = {"scaling": self.head_dim**-0.5, "sliding_window": self.config.windows[self.layer] + 1}
            y_BSHD, _ = attend(self, q_BHSD, k_BGTD, v_BGTD, mask, **options)
            return self.o_proj(y_BSHD.flatten(2))
        y_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGTD, v_BGTD, mask, is_causal=is_causal, enable_gqa=self.num_heads != self.num_kv_heads
        )
        if context.attentions is not None:
            context.attentions.append(F.pad(attention_weights(q_BHSD, k_BGTD, mask, is_causal), (start, 0)))
        return self.o_proj(y_BHSD.transpose(1, 2).flatten(2))

    def _heads(self, x_BSK, num_heads):
        return x_BSK.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

    def _read(self, context, start):
        """What the source reads from position `start` on, `[B, G, T - start, D]`; if it is x0, for new ones only."""
        if self.reads == "first_layer":
            return context.first_values_BGTD[:, :, start:]
        if self.reads == "embedding":
            return self._heads(self.v_proj(rms_norm(context.x0_BSC)), self.num_kv_heads)
        return self._heads(context.look_up(self, start), self.num_kv_heads)

    def _values_to_cache(self, x_BSC, context, k_BGSD):
        """The new positions' values; of width 0 if they can be recomputed without the residual stream."""
        if not self.caches_values:
            return k_BGSD[..., :0]
        a, b = self.projection_coefficient, self.source_coefficient
        v_BGSD = self._heads(self.v_proj(x_BSC), self.num_kv_heads) if self.projects else 0
        if self.reads is None:
            return b * v_BGSD
        read_BGSD = self._read(context, -x_BSC.size(1))
        if self.value_gate is not None:
            gate_BSG = 3 * torch.sigmoid(self.value_gate(x_BSC[..., :GATE_CHANNELS]))
            read_BGSD = gate_BSG.transpose(1, 2)[..., None] * read_BGSD
        return a * v_BGSD + b * read_BGSD


class BovMLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSC):
        return self.down_proj(F.relu(self.up_proj(x_BSC)).square())


class BovDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on the normalised residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = BovAttention(config, layer)
        self.mlp = BovMLP(config)

    def forward(self, x_BSC, context, cache):
        x_BSC = x_BSC + self.self_attn(rms_norm(x_BSC), context, cache)
        return x_BSC + self.mlp(rms_norm(x_BSC))


class BovContext:
    """State shared by all layers in a forward pass: ids, x0, layer 0's values, rotary angles and masks.

    `attentions` collects each layer's weights if it is a list; `kept_rows` is a BovCache's.
    """

    def __init__(self, config, ids_BT, position_ids_BS, attention_mask_BT, dtype, attentions=None):
        self.ids_BT, self.windows = ids_BT, config.windows
        self.num_new, self.attention_mask_BT = position_ids_BS.size(1), attention_mask_BT
        self.x0_BSC = self.first_values_BGTD = self.shared_table = None
        self.attentions, self.kept_rows = attentions, None
        self.is_flash = config._attn_implementation not in (None, "eager", "sdpa")
        self._masks = {}
        self._distinct = {}
        # Not a buffer, because loading on the meta device would lose it.
        steps = torch.arange(0, config.head_dim, 2, device=ids_BT.device, dtype=torch.float32)
        angles = position_ids_BS[:, None, :, None].float() / config.rotary_base ** (steps / config.head_dim)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [B, 1, S, D/2]

    def rotate(self, x_BHSD):
        """Half-split rotary embedding, rotating in the opposite direction to Llama's."""
        x1, x2 = x_BHSD.chunk(2, dim=-1)
        return torch.cat([x1 * self.cos + x2 * self.sin, x2 * self.cos - x1 * self.sin], dim=-1)

    def look_up(self, attention, start):
        """Rows of the tokens from position `start` on, `[B, T - start, K]`; a BovTable gives each distinct one once,
        and with a cache only those that the step before didn't have."""
        table, ids_BT = self.shared_table or attention.value_table, self.ids_BT[:, start:]
        if isinstance(table, nn.Embedding):
            return table(ids_BT)
        first = self.ids_BT.size(1) - ids_BT.size(1)
        if first not in self._distinct:
            self._distinct[first] = ids_BT.unique(return_inverse=True)
        distinct_N, which_BT = self._distinct[first]
        if self.kept_rows is None:
            return F.embedding(which_BT, table(distinct_N, self.x0_BSC))
        # By token id, not by position: whatever becomes of the cache's rows and positions, a token's row is its own.
        key = None if self.shared_table is not None else attention.layer, self.windows[attention.layer]
        rows_NK = self._with_kept(table, distinct_N, self.kept_rows.get(key))
        self.kept_rows[key] = distinct_N, rows_NK
        return F.embedding(which_BT, rows_NK)

    def _with_kept(self, table, distinct_N, kept):
        """Rows of distinct ids, in ascending order; those of `kept`, `(ids, rows)` likewise, aren't looked up again."""
        if kept is None:
            return table(distinct_N, self.x0_BSC)
        kept_M, rows_MK = kept
        at_N = torch.searchsorted(kept_M, distinct_N).clamp(max=len(kept_M) - 1)
        is_kept_N = kept_M[at_N] == distinct_N
        rows_NK = rows_MK[at_N]
        rows_NK[~is_kept_N] = table(distinct_N[~is_kept_N], self.x0_BSC)
        return rows_NK

    def mask(self, layer):
        """`(start, mask, is_causal)` of a layer; keys before `start` are outside every query's window.

        Flash attention's mask is 1 on tokens and 0 on padding, `[B, T - start]`: it makes windows itself.
        """
        window = self.windows[layer]
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window):
        new, total = self.num_new, self.ids_BT.size(1)
        start = max(0, total - new - window)
        padded = self.attention_mask_BT is not None and not bool(self.attention_mask_BT[:, start:].all())
        if self.is_flash:
            return start, self.attention_mask_BT[:, start:] if padded else None, True
        if not padded and total - start <= window + 1:
            if new == 1:
                return start, None, False
            if new == total:
                return start, None, True
        position = torch.arange(start, total, device=self.ids_BT.device)
        distance = position[-new:, None] - position
        visible = ((distance >= 0) & (distance <= window))[None, None]
        if padded:
            # A padded position sees itself, so that no softmax row is empty; no other position sees it.
            visible = visible & self.attention_mask_BT[:, None, None, start:].bool() | (distance == 0)
        return start, visible, False


class BovPreTrainedModel(PreTrainedModel):
    """Initial weights as in arXiv 2606.02780, except that tables are uniform instead of copied from the embedding."""

    config_class = BovConfig
    base_model_prefix = "model"
    _no_split_modules = ["BovDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = _supports_flash_attn_2 = True  # the second is the name before transformers 4.54
    supports_gradient_checkpointing = True

    def __init__(self, config):
        config.check()
        super().__init__(config)
        if config.bank_device is not None:
            self._keys_to_ignore_on_load_unexpected = [r"value_table\."]  # read by _load_pretrained_model below

    @classmethod
    def _can_set_attn_implementation(cls):
        # transformers finds it out by looking for phrases in this file, other ones in each version.
        return True

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **options):
        # Here transformers has found or downloaded the files, and has read none of them yet.
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **options)
        if model.config.bank_device is not None:
            model._load_tables(checkpoint_files)
        return loaded

    def _load_tables(self, checkpoint_files):
        """Take the rows of all tables from safetensors files."""
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(
                f"bank_device={self.config.bank_device!r} takes value tables from safetensors files, found "
                f"{checkpoint_files or 'a state_dict'}; leave bank_device out, or save the model as safetensors"
            )
        prefix = self.base_model_prefix + "."
        wanted = {
            f"{name}.{part}".removeprefix(prefix): (table, part)
            for name, table in self.tables()
            for part in table.shapes
        }
        for file in checkpoint_files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if (found := wanted.pop(name.removeprefix(prefix), None)) is not None:
                        table, part = found
                        table.set_outside(part, opened.get_tensor(name), file)
        if wanted:
            raise ValueError(f"{', '.join(map(str, checkpoint_files))}: no {', '.join(wanted)}")

    def tables(self):
        """Names and modules of value tables that are no plain embeddings."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, BovTable)]

    def save_pretrained(self, save_directory, *args, **options):
        """As in `PreTrainedModel`, but not over files that `bank_device="mmap"` reads."""
        mapped = {os.path.dirname(table.file) for _, table in self.tables() if table.file}
        if os.path.isdir(save_directory) and any(os.path.samefile(folder, save_directory) for folder in mapped):
            raise ValueError(
                f"{save_directory} holds the value tables that this model reads with bank_device='mmap'; save to "
                "another folder, or load with bank_device='cpu'"
            )
        super().save_pretrained(save_directory, *args, **options)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **options):
        # A reentrant checkpoint loses gradients here: x0 and layer 0's values reach a layer through the context.
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **options)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in `PreTrainedModel`, and every value table with it: a new token needs a row in each."""
        if self.tables() and (new_num_tokens or pad_to_multiple_of):
            raise ValueError(
                f"bank_device={self.config.bank_device!r}, table_dtype={self.config.table_dtype!r}: only value tables "
                "that are parameters can be resized; load an export without int8 tables, without bank_device"
            )
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.modules():
            table = getattr(module, "value_table", None)
            if table is not None and table.num_embeddings != embedding.num_embeddings:
                resized = self._get_resized_embeddings(table, embedding.num_embeddings, mean_resizing=mean_resizing)
                module.value_table = resized.requires_grad_(table.weight.requires_grad)
        return embedding

    @torch.no_grad()
    def _init_weights(self, module):
        bound = (3 / self.config.hidden_size) ** 0.5
        if isinstance(module, BovAttention):
            for name in ("q_proj", "k_proj", "v_proj", "value_table"):
                if isinstance(getattr(module, name, None), (nn.Linear, nn.Embedding)):
                    getattr(module, name).weight.uniform_(-bound, bound)
            if module.value_gate is not None:
                module.value_gate.weight.uniform_(0, 0.02)
            module.o_proj.weight.zero_()
            if isinstance(module.source_coefficient, nn.Parameter):
                module.source_coefficient.fill_(0.0 if module.is_sum else 1.0)
            if isinstance(module.projection_coefficient, nn.Parameter):
                module.projection_coefficient.fill_(1.0)
        elif isinstance(module, BovMLP):
            module.up_proj.weight.uniform_(-0.4 * bound, 0.4 * bound)
            module.down_proj.weight.zero_()
        elif isinstance(module, BovSmear):
            module.scale.zero_()
        elif isinstance(module, BovModel):
            module.embed_tokens.weight.normal_(0, 0.8)
            if isinstance(module.value_table, nn.Embedding):
                module.value_table.weight.uniform_(-bound, bound)
        elif isinstance(module, BovForCausalLM):
            module.lm_head.weight.normal_(0, 0.001)


class BovModel(BovPreTrainedModel):
    """The decoder without its output matrix."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.smear = BovSmear(config)
        self.value_table = None
        if config.has_shared_table:
            self.value_table = make_table(config)
        self.layers = nn.ModuleList(BovDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
    ):
        """`input_ids` `[B, S]`; `attention_mask` `[B, T]`, 0 on padding. Returns the normalised last hidden state.

        `cache` and `past_key_values` are two names for a BovCache.
        """
        self._check(input_ids, inputs_embeds, attention_mask)
        cache = self._cache(cache, past_key_values, use_cache)
        new = input_ids.size(1)
        ids_BT = input_ids if cache is None else cache.update_ids(input_ids)
        past = ids_BT.size(1) - new
        if position_ids is None:
            position_ids = _positions(ids_BT, attention_mask)[:, past:]

        x_BSC = rms_norm(self.embed_tokens(input_ids))
        x_BSC = self.smear(x_BSC, self._previous(x_BSC, ids_BT, attention_mask))
        attentions: list | None = [] if _chosen(output_attentions, self.config.output_attentions) else None
        states: list | None = [] if _chosen(output_hidden_states, self.config.output_hidden_states) else None
        context = BovContext(self.config, ids_BT, position_ids, attention_mask, x_BSC.dtype, attentions)
        if context.is_flash and attentions is not None:
            raise ValueError(
                f"output_attentions: attn_implementation={self.config._attn_implementation!r} computes no attention "
                "weights; load the model with attn_implementation='sdpa'"
            )
        context.x0_BSC, context.shared_table = x_BSC, self.value_table
        context.kept_rows = None if cache is None else cache.rows
        for layer in self.layers:
            if states is not None:
                states.append(x_BSC)
            x_BSC = layer(x_BSC, context, cache)
        x_BSC = rms_norm(x_BSC)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x_BSC,
            hidden_states=None if states is None else (*states, x_BSC),
            attentions=None if attentions is None else tuple(attentions),
            **{CACHE: cache},
        )
        return outputs if _chosen(return_dict, self.config.return_dict) else outputs.to_tuple()

    def _check(self, input_ids, inputs_embeds, attention_mask):
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("BovModel needs input_ids: values are looked up by token id, so inputs_embeds can't work")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, positions], found shape {tuple(attention_mask.shape)}")
        if torch.compiler.is_compiling() or input_ids.is_meta or not input_ids.numel():
            return
        lowest, highest = (int(extreme) for extreme in input_ids.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"input_ids contains {lowest if lowest < 0 else highest}, but this model's ids are 0 to "
                f"{self.config.vocab_size - 1}; for a tokenizer with added tokens, call "
                "model.resize_token_embeddings(len(tokenizer))"
            )

    def _cache(self, cache, past_key_values, use_cache):
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names for one argument; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, BovCache):
            raise ValueError(
                f"{CACHE} is a {type(cache).__name__}, but this model needs a BovCache, which holds token ids in place "
                "of values; pass none to have one made"
            )
        # Computing a layer again for the backward pass would append to the cache twice.
        if self.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in self.layers):
            if cache is not None:
                raise ValueError(f"{CACHE} doesn't work with gradient checkpointing in training; pass none")
            return None
        if cache is None and _chosen(use_cache, self.config.use_cache and not self.training):
            return BovCache(self.config)
        return cache

    def _previous(self, x_BSC, ids_BT, attention_mask_BT):
        """The token to the left of each new one, before smearing; zero at the start of a row and after padding."""
        past = ids_BT.size(1) - x_BSC.size(1)
        before_BSC = torch.zeros_like(x_BSC[:, :1])
        if past:
            before_BSC = rms_norm(self.embed_tokens(ids_BT[:, past - 1 : past]))
        previous_BSC = torch.cat([before_BSC, x_BSC[:, :-1]], dim=1)
        if attention_mask_BT is not None:
            is_token_BT = F.pad(attention_mask_BT, (1, 0))[:, past:-1]
            previous_BSC = previous_BSC * is_token_BT[..., None].to(x_BSC.dtype)
        return previous_BSC


def _chosen(argument, configured):
    return configured if argument is None else argument


def _positions(ids_BT, attention_mask_BT):
    """Positions of all tokens, `[B, T]`, counted from each row's first token that is not padding."""
    if attention_mask_BT is None:
        return torch.arange(ids_BT.size(1), device=ids_BT.device).expand_as(ids_BT)
    if attention_mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask_BT.shape)}, but the tokens have {tuple(ids_BT.shape)} "
            "including cached ones, which it must cover too"
        )
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


class BovForCausalLM(BovPreTrainedModel, GenerationMixin):
    """The decoder with its output matrix and soft cap."""

    def __init__(self, config):
        super().__init__(config)
        self.model = BovModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # For Trainer: whether forward takes num_items_in_batch.
    accepts_loss_kwargs = True

    # Without **kwargs, so that Python refuses what the model doesn't know.
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        cache=None,
    ):
        """Logits are fp32, after the soft cap. `labels` `[B, S]` are shifted here; the loss ignores -100.

        `num_items_in_batch` divides the summed loss, in place of the number of labels in this batch.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache=cache,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x_BSC = outputs.last_hidden_state[:, keep] if not isinstance(keep, int) else outputs.last_hidden_state
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(self.lm_head(x_BSC).float() / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        outputs = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        return outputs if _chosen(return_dict, self.config.return_dict) else outputs.to_tuple()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """What generation passes to `forward`."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)  # of transformers 4; the cache itself tells where the new tokens belong
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # Generation's default cache would store the ids as floats.
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={kind!r} doesn't work with this model, whose cache grows and holds token ids in "
                "place of the bank layers' values; leave cache_implementation out"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = BovCache(self.config)
