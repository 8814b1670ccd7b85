"""Configuration of an exported Bank-of-Values model. Ships with the export, so it imports only transformers."""

from transformers import PretrainedConfig


def _facts(projects, reads, coefficients, gated=False):
    return {"projects": projects, "reads": reads, "coefficients": coefficients, "gated": gated}


# A target layer's values are `a * W_V x + b * gate * (what it reads)`. Which of these a source has, for configurations
# that carry no `value_source_facts`: the records of bov_megatron/recipe/value_sources.py.
VALUE_SOURCES = {
    "projection": _facts(True, None, 0),
    "bank": _facts(False, "table", 1),
    "embedding_projection": _facts(False, "embedding", 1),
    "first_layer": _facts(False, "first_layer", 1),
    "scaled_projection": _facts(True, None, 1),
    "projection_plus_first_layer": _facts(True, "first_layer", 2),
    "projection_plus_embedding": _facts(True, "embedding", 2),
    "projection_plus_bank": _facts(True, "table", 2),
    "gated_value_embedding": _facts(True, "table", 0, gated=True),
}


class BovConfig(PretrainedConfig):
    """A decoder whose target layers don't simply project their attention values from the residual stream.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as usual.
        num_key_value_heads: key and value heads; `None` means one per attention head.
        head_dim: `None` means hidden_size / num_attention_heads.
        max_position_embeddings: sequence length of training.
        windows: per layer, number of keys to the left of its own position that a query sees; `None` means
            max_position_embeddings in every layer.
        value_source: name of what the target layers use; one of VALUE_SOURCES unless `value_source_facts` are given.
        value_source_facts: what that is made of: `projects` (`W_V x` is a part), `reads` (`table`, `embedding`,
            `first_layer` or `None`), `coefficients` (how many), `gated`; `None` means those in VALUE_SOURCES.
        target_layers: 0-based layers that use `value_source`; all others project.
        value_coefficient: `learned`, or `fixed` (1 for a single source, 0.5 + 0.5 for a sum).
        value_table: `per_layer`, or `shared`: one table for all target layers.
        rotary_base: base of the rotary frequencies.
        logit_softcap: logits are `cap * tanh(logits / cap)`.
        qk_scale: factor on q and on k after their per-head norm.
        bank_device: where value tables are: `None` is on the model's device, as parameters; `cpu` in the host's memory;
            `mmap` in their safetensors file, whose rows are read when a token needs them. May be given to
            `from_pretrained`.
        table_dtype: of stored value tables: `None` is that of the other weights; `int8` has a scale per row.
    """

    model_type = "bov"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
        windows=None,
        value_source="projection",
        value_source_facts=None,
        target_layers=(),
        value_coefficient="learned",
        value_table="per_layer",
        rotary_base=100000.0,
        logit_softcap=15.0,
        qk_scale=1.2,
        bank_device=None,
        table_dtype=None,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.windows = list(windows) if windows is not None else [max_position_embeddings] * num_hidden_layers
        if value_source_facts is None and value_source not in VALUE_SOURCES:
            raise ValueError(f"value_source={value_source!r} is not one of {', '.join(VALUE_SOURCES)}")
        self.value_source = value_source
        self.value_source_facts = value_source_facts or VALUE_SOURCES[value_source]
        self.target_layers = list(target_layers)
        self.value_coefficient = value_coefficient
        self.value_table = value_table
        self.rotary_base = rotary_base
        self.logit_softcap = logit_softcap
        self.qk_scale = qk_scale
        self.bank_device = bank_device
        self.table_dtype = table_dtype
        self.use_cache = use_cache
        self.check()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def check(self):
        """Raise ValueError for what no model has; called again by models, as `from_pretrained` may have changed it."""
        if self.bank_device not in (None, "cpu", "mmap"):
            raise ValueError(f"bank_device={self.bank_device!r} is neither None (the model's device), 'cpu' nor 'mmap'")
        if self.table_dtype not in (None, "int8"):
            raise ValueError(f"table_dtype={self.table_dtype!r} is neither None (as the other weights) nor 'int8'")
        if self.value_coefficient not in ("learned", "fixed"):
            raise ValueError(f"value_coefficient={self.value_coefficient!r} is neither 'learned' nor 'fixed'")
        if self.value_table not in ("per_layer", "shared"):
            raise ValueError(f"value_table={self.value_table!r} is neither 'per_layer' nor 'shared'")
        if len(self.windows) != self.num_hidden_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries; it needs one for each of the "
                f"num_hidden_layers={self.num_hidden_layers} layers"
            )
        if outside := [layer for layer in self.target_layers if not 0 <= layer < self.num_hidden_layers]:
            raise ValueError(f"target_layers={outside}: layers are 0 to {self.num_hidden_layers - 1}")
        if self.value_source_facts["reads"] == "first_layer" and 0 in self.target_layers:
            raise ValueError(f"target_layers contains 0, but value_source={self.value_source!r} reads layer 0's values")

    def facts_of(self, layer):
        """`value_source_facts` of one layer."""
        return self.value_source_facts if layer in self.target_layers else VALUE_SOURCES["projection"]

    @property
    def has_shared_table(self):
        """Whether one value table serves all target layers."""
        has_table = self.value_source_facts["reads"] == "table"
        return self.value_table == "shared" and has_table and bool(self.target_layers)
