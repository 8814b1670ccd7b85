"""The recipe: dataclasses that hold every setting of a run.

A recipe is a YAML file with these dataclasses as sections. `base:` names another recipe to build on, relative to the
file. Any field can be overridden as `section.field=value`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from bov_megatron.recipe.limits import AboveZero, AtLeast, AtMost, OneOf, Within
from bov_megatron.recipe.value_sources import PROJECTION, VALUE_SOURCES, ValueSourceFacts

SMEAR_CHANNELS = 24
"""Leading channels of a token that its smear gate reads (arXiv 2606.02780)."""
TARGET_LAYERS = ("last_third", "every", "every_second", "second_half", "last_two_thirds")

Size = Annotated[int, AtLeast(1), AtMost(2**31 - 1)]
Count = Annotated[int, AtLeast(0)]
Positive = Annotated[float, AboveZero()]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Within(1.0)]
Decay = Annotated[float, Within(1.0, open_end=True)]


@dataclass
class ValueConfig:
    """Where the target layers' attention values come from (arXiv 2606.02780)."""

    source: Annotated[str, OneOf(VALUE_SOURCES)] = PROJECTION
    """What the target layers' values are computed from; formulas in model/sources.py."""
    target_layers: Annotated[str | list[int], OneOf(TARGET_LAYERS, "or a list of 0-based layers")] = "last_third"
    """Layers that take their values from `source`. Ignored for `projection`. Layer 0 is excluded for sources that read
    its values."""
    coefficient: Literal["learned", "fixed"] = "learned"
    """`fixed` is 1 for a single source, 0.5 + 0.5 for a sum. Ignored for `projection` and `gated_value_embedding`,
    which have no coefficient."""
    table: Literal["per_layer", "shared"] = "per_layer"
    """`shared`: one table for all target layers."""
    table_partition: Literal["vocab", "head"] = "vocab"
    """How tensor-parallel ranks split a table: by `vocab` rows, like the embedding, or by `head`."""
    lookup: Literal["distinct", "reduce_scatter"] = "distinct"
    """How a vocabulary-parallel lookup communicates: `distinct` sends each distinct row once, ahead of its layer;
    `reduce_scatter`, the simple reference, sends every token's row inside the layer."""
    table_memory: Literal["device", "host"] = "device"
    """Where tables, their gradients and their optimizer state live: `device`, or `host`, with the distinct rows of each
    micro-batch copied to the device ahead of their layers."""

    @property
    def facts(self) -> ValueSourceFacts:
        return VALUE_SOURCES[self.source]

    def rows_sent_ahead(self, tensor_model_parallel_size: int) -> bool:
        """Whether the tables' distinct rows are sent ahead of the layers that read them."""
        exchanged = tensor_model_parallel_size > 1 and self.table_partition == "vocab"
        ahead = self.table_memory == "host" or (self.lookup == "distinct" and exchanged)
        return self.facts.has_table and ahead


@dataclass
class ModelConfig:
    """The decoder of arXiv 2606.02780."""

    num_layers: Annotated[int, AtLeast(1), AtMost(1000)] = 12
    """Decoder layers."""
    hidden_size: Annotated[int, AtLeast(SMEAR_CHANNELS, f"smear reads {SMEAR_CHANNELS} channels of a token")] = 768
    """Width of the residual stream."""
    num_attention_heads: Size = 6
    """Query heads."""
    num_query_groups: Size | None = None
    """Key/value heads; `null` means one per attention head (no GQA)."""
    head_dim: Size | None = None
    """Channels of a head, even; `null` means hidden_size / num_attention_heads."""
    ffn_hidden_size: Size | None = None
    """Width of the feed-forward layer; `null` means 4 * hidden_size."""
    vocab_size: Size = 32768
    """Vocabulary size with special tokens, without the padding that tensor parallelism adds."""
    sequence_length: Size = 2048
    """Tokens per training sample; the attention windows are computed from it."""
    window_pattern: str = "SSSL"
    """Attention windows, repeated over the layers; the last layer is always L. L is `sequence_length`, S a quarter of
    it, rounded up to a multiple of 128."""
    rotary_base: Positive = 100000.0
    """Base of the rotary position embedding's frequencies."""
    logit_softcap: Positive = 15.0
    """Logits become `c * tanh(logits / c)` with this c."""
    qk_scale: Positive = 1.2
    """Factor on q and on k after their per-head norm."""
    core_attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Kernels on a GPU. `auto`: flash attention in bf16, with windows too; FlexAttention for what it cannot do. `sdpa`:
    SDPA over blocks of keys in place of FlexAttention. `flex`: FlexAttention for windows and over context-parallel
    ranks."""
    linear_layers: Literal["megatron", "transformer_engine"] = "megatron"
    """Implementation of the blocks' linear layers; `transformer_engine` must be installed."""
    value: ValueConfig = field(default_factory=ValueConfig)
    """Where the target layers' values come from; see section `model.value`."""

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_dim(self) -> int:
        """Width of one token's values in a layer, which is the width of a value table."""
        return self.kv_heads * self.kv_channels

    @property
    def query_dim(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    def windows(self) -> list[int]:
        """Attention window of each layer: how many earlier keys a query sees."""
        short = -(-self.sequence_length // (4 * 128)) * 128
        size = {"L": self.sequence_length, "S": short}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.num_layers)]
        pattern[-1] = "L"
        return [size[letter] for letter in pattern]

    def layers_from_source(self) -> list[int]:
        """0-based indices of the layers that take their values from `value.source`."""
        if self.value.source == PROJECTION:
            return []
        n, target = self.num_layers, self.value.target_layers
        if not isinstance(target, str):
            layers = list(target)
        elif target == "every_second":
            layers = [i for i in range(n) if i % 2 == (n - 1) % 2]
        else:
            first = {"last_third": 2 * n // 3, "second_half": n // 2, "last_two_thirds": n // 3, "every": 0}
            layers = list(range(first[target], n))
        if self.value.facts.reads == "first_layer":
            layers = [i for i in layers if i != 0]
        return layers

    def source_of(self, layer: int) -> str:
        return self.value.source if layer in self.layers_from_source() else PROJECTION

    def facts_of(self, layer: int) -> ValueSourceFacts:
        return VALUE_SOURCES[self.source_of(layer)]


@dataclass
class ParallelConfig:
    """How the model is split over ranks. The remaining ranks are data parallel."""

    tensor_model_parallel_size: Size = 1
    """Tensor-parallel ranks; they split heads, feed-forward width and vocabulary rows (value tables included)."""
    pipeline_model_parallel_size: Size = 1
    """Pipeline stages; each holds consecutive layers."""
    virtual_pipeline_model_parallel_size: Size = 1
    """Model chunks per pipeline stage. More than one is an interleaved pipeline: smaller bubbles, more messages."""
    pipeline_balance: Literal["layers", "time", "memory"] = "layers"
    """What to balance over the stages: the number of `layers`, the `time` (FLOPs: a bank saves some, the output matrix
    adds some) or the `memory` (with tables, logits and micro-batches in flight)."""
    pipeline_layers: list[int] | None = None
    """Number of layers of each stage, instead of `pipeline_balance`. Interleaved: of the first model chunk of every
    stage, then of the second, and so on."""
    context_parallel_size: Size = 1
    """Context-parallel ranks; each holds two chunks of the sequence and gathers all keys and values."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence; needs tensor parallelism."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and main weights over data-parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients over data-parallel ranks bucket by bucket during the backward pass; DeepSpeed orders its own
    traffic."""
    overlap_param_gather: bool = False
    """Gather updated weights layer by layer during the next forward pass; until then they take twice the memory. Needs
    `use_distributed_optimizer`."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` of core attention, `full` of whole layers."""
    recompute_num_layers: int | None = None
    """With `recompute: full`, recompute only so many layers at the start of each pipeline stage (interleaved: of each
    model chunk); `null` means all."""
    make_vocab_size_divisible_by: Size = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks of a stage in Megatron's form: None where the pipeline is not interleaved."""
        return self.virtual_pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size > 1 else None

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class DeepSpeedConfig:
    """ZeRO's settings; ignored unless `engine: deepspeed`."""

    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded over data-parallel ranks: 1 optimizer state, 2 gradients as well, 3 weights as well."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer state lives and the update runs: on the device (`none`) or on the host (`cpu`)."""


@dataclass
class TrainConfig:
    """How long and how precisely to train."""

    micro_batch_size: Size = 1
    """Sequences per forward pass on one data-parallel rank."""
    global_batch_size: Size = 256
    """Sequences per optimizer step, over all ranks."""
    steps: Size | None = None
    """Optimizer steps; `null` means as many as `budget_flops` pays for."""
    budget_flops: Positive | None = None
    """Training FLOPs to spend, as `plan` counts them; used when `steps` is null."""
    max_minutes: Positive | None = None
    """Save and exit with status 143 after so many minutes, to be started again; `null`: no limit."""
    seed: Count = 1234
    """Seed of the initial weights, which depend only on it and on the parameter names."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` keeps fp32 main weights and gradients."""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = "none"
    """FP8 scaling of the blocks' matrix products: `none`, `tensorwise` (H100 and later), `blockwise` (128 values, H100)
    or `mxfp8` (32 values, B200). Needs `model.linear_layers: transformer_engine`."""
    compile: bool | None = None
    """Compile norms, rotary embedding, activation, smear, loss and the optimizer's elementwise part with torch.compile;
    `null`: where there is a GPU. The first steps take a minute longer; a C compiler is needed."""
    deterministic: bool = False
    """Use deterministic kernels where torch has them."""


@dataclass
class OptimizerConfig:
    """Muon + AdamW (arXiv 2606.02780). Learning rates and decays hold at the reference batch and width;
    `recipe.quantities.effective_rates` scales them to the run's batch and by (hidden_size / 768)^-0.5."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon` (Muon for block matrices, AdamW for the rest) or `adamw` (AdamW for everything)."""
    matrix_lr: NotNegative = 0.02
    """Block matrices (q, k, v, attention output, feed-forward, gate) under Muon."""
    embedding_lr: NotNegative = 0.3
    """Token embedding; also × (hidden_size / 768)^-0.5."""
    output_lr: NotNegative = 0.008
    """Output matrix; also × (hidden_size / 768)^-0.5."""
    table_lr: NotNegative = 0.15
    """Value tables; also × (hidden_size / 768)^-0.5."""
    coefficient_lr: NotNegative = 0.5
    """gamma, and b of a sum: the coefficient of the table, embedding or first-layer values."""
    projection_coefficient_lr: NotNegative = 0.005
    """a of a sum: the coefficient of the layer's own projected values."""
    smear_lr: NotNegative = 0.2
    """The smear's gate and scale."""
    weight_decay: NotNegative = 0.28
    """Block matrices under Muon; follows a half cosine to 0."""
    embedding_weight_decay: NotNegative = 0.001
    """Token embedding."""
    output_weight_decay: NotNegative = 0.01
    """Output matrix."""
    table_weight_decay: NotNegative = 0.01
    """Value tables."""
    projection_coefficient_weight_decay: NotNegative = 0.05
    """a of a sum: the coefficient of the layer's own projected values."""
    adamw_matrix_lr: NotNegative = 0.0006
    """Block matrices when `name` is `adamw`."""
    adamw_matrix_weight_decay: NotNegative = 0.1
    """Block matrices when `name` is `adamw`."""
    adamw_matrix_betas: list[Decay] = field(default_factory=lambda: [0.9, 0.95])
    """Block matrices when `name` is `adamw`; two numbers."""
    eps: Positive = 1e-10
    """AdamW's epsilon."""
    warmup_steps: Count = 40
    """Steps over which learning rates rise linearly from 0."""
    warmdown_ratio: Share = 0.65
    """Last share of the steps, over which learning rates fall linearly to `final_lr_fraction`."""
    final_lr_fraction: Share = 0.05
    """Learning rates at the end of the warmdown, as a share of the peak."""
    momentum_start: Decay = 0.85
    """Muon's momentum at step 0."""
    momentum_peak: Decay = 0.97
    """Muon's momentum after `momentum_warmup_steps`."""
    momentum_final: Decay = 0.90
    """Muon's momentum at the last step; it falls to this over the warmdown."""
    momentum_warmup_steps: Count = 400
    """Steps over which Muon's momentum rises from start to peak."""
    muon_beta2: Decay = 0.9
    """Decay of the running row or column variance that normalises Muon's update (arXiv 2510.05491)."""
    newton_schulz_steps: Size = 5
    """Orthogonalisation steps of Muon (Polar Express, arXiv 2505.16932)."""
    clip_grad: NotNegative = 0.0
    """Maximum global gradient norm; 0 means no clipping."""
    reference_batch_tokens: Annotated[int | None, AtLeast(1, "null turns this scaling off")] = 524288
    """Batch size B in tokens at which the rates above hold: every learning rate and `weight_decay` × sqrt(B / this).
    `null`: no scaling."""
    reference_parameters: Annotated[int | None, AtLeast(1, "null turns this scaling off")] = 110100480
    """Matrix and output parameters N at which `weight_decay` holds: × this / N, because larger models train longer.
    `null`: no scaling."""


@dataclass
class StreamConfig:
    """One prepared data set of a mixture."""

    path: str = ""
    """Folder written by tools/prepare_data.py, or the local cache of `remote`."""
    remote: str | None = None
    """Location of the data if not on this machine, e.g. s3://bucket/prefix."""
    weight: Positive = 1.0
    """Share of the training samples, relative to the other streams' weights."""


@dataclass
class DataConfig:
    """Which tokens, in which order: a function of these fields and `train.global_batch_size`, never of the layout."""

    path: str | None = None
    """Folder written by tools/prepare_data.py; short for a single stream."""
    remote: str | None = None
    """Remote location of `path`, which is then a local cache."""
    streams: list[StreamConfig] = field(default_factory=list)
    """Several weighted data sets, instead of `path`."""
    shuffle: bool = True
    """Shuffle the training samples."""
    shuffle_seed: Count = 9176
    """Seed of the sample order; independent of `train.seed`."""
    shuffle_block_size: Size = 65536
    """Samples that are shuffled together; a block spans whole shards."""
    num_canonical_nodes: Size | None = 1
    """Parts of the data set that are read in parallel, so that a node needs only some of the shards; `null` means as
    many as nodes that the run begins on, which it then keeps."""
    num_workers: Count = 1
    """Threads that read ahead on each rank; 0 reads when the step asks for its batch."""
    prefetch_factor: Size = 8
    """Batches that a rank reads ahead, over all its threads."""


@dataclass
class ValidationConfig:
    """Bits per byte on the held-out split."""

    interval: Count = 250
    """Steps between validations; 0 means only at the end."""
    tokens: Annotated[int, AtLeast(1)] = 41_943_040
    """Maximum number of held-out tokens to score."""
    micro_batch_size: Size | None = None
    """Sequences per forward pass; `null` means train.micro_batch_size."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues after each validation, always with its most probable token; the continuations are
    among the metrics."""
    prompt_tokens: Size = 48
    """Tokens of a continuation, at most. Each costs a forward pass over all prompts, without a cache."""


@dataclass
class HeldOutConfig:
    """One held-out data set, such as the text of one domain, scored in bits per byte."""

    name: str = ""
    """What its score is called in the metrics: `evaluation/bits_per_byte/NAME`."""
    path: str = ""
    """Folder written by tools/prepare_data.py, with a held-out split, or the local cache of `remote`."""
    remote: str | None = None
    """Location of the data if not on this machine, e.g. s3://bucket/prefix."""


@dataclass
class EvaluationConfig:
    """Scores of the model in training beside those of `validation`. Nothing is evaluated unless `held_out`, `tasks` or
    `core` says what."""

    every: Count = 0
    """Steps between evaluations; 0 means only at the end."""
    where: Literal["training", "slurm"] = "training"
    """`training`: between steps, on the run's own ranks. `slurm`: in a Slurm job of its own (slurm/evaluate.sh), which
    the run submits once the checkpoint of the step is complete."""
    sbatch: list[str] = field(default_factory=list)
    """With `where: slurm`, options of sbatch before the script, such as `--partition=small`."""
    time_share: Annotated[float, AboveZero(), Within(1.0)] = 0.1
    """The largest share of the time that evaluations may take: after one of s seconds, those that are due within
    s / time_share seconds of its beginning are left out. The one after the last step never is. Jobs take none."""
    held_out: list[HeldOutConfig] = field(default_factory=list)
    """Data sets whose held-out splits are scored in bits per byte, each by itself."""
    tokens: Annotated[int, AtLeast(1)] = 4_194_304
    """Maximum number of held-out tokens to score of each data set."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks: names, or paths of YAML files."""
    tasks_dir: str | None = None
    """Folder of local YAML tasks, searched for `tasks` first."""
    num_fewshot: Count | None = None
    """Examples in the prompts of `tasks`; `null` means what the task says."""
    core: str | None = None
    """Folder of DCLM's evaluation bundle, whose CORE tasks are scored."""
    core_tasks: list[str] = field(default_factory=list)
    """The tasks of `core` to score; none listed means all."""
    limit: Size | None = None
    """Examples of each task of `tasks` and `core`; `null` means all."""
    batch_size: Size = 8
    """Sequences per forward pass of a model replica in `tasks` and `core`."""

    @property
    def lists_anything(self) -> bool:
        return bool(self.held_out or self.tasks or self.core)

    @property
    def on_these_ranks(self) -> bool:
        """Whether the run's own ranks evaluate."""
        return self.lists_anything and self.where == "training"


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    interval: Count = 1000
    """Steps between checkpoints; 0 means only at the end."""
    keep_last: Size = 3
    """Newest checkpoints to keep; older ones are deleted."""
    keep_every: Count = 0
    """Also keep, for good, every checkpoint whose step is a multiple of this; 0 means none."""
    asynchronous: bool = False
    """Write in the background: training stops only for a copy to host memory. Linux only."""


@dataclass
class HealthConfig:
    """How hangs, loss spikes and numbers that are not finite are handled."""

    hang_minutes: NotNegative = 20.0
    """After so long without a finished step, validation chunk or checkpoint, every rank writes its stacks to
    `stacks/` in the run folder and exits with status 4; 0 means never."""
    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """What to do when the loss of a step is a spike: `warn` (update and print a warning), `skip` (leave out the update)
    or `rollback` (go back to the newest checkpoint and leave out the samples used since). Steps whose loss or gradients
    are not finite are always skipped."""
    spike_deviations: NotNegative = 12.0
    """A loss is a spike if it is so many robust standard deviations above the median of the window; 0 means never."""
    spike_window: Annotated[int, AtLeast(4, "fewer losses give no estimate of their spread")] = 128
    """Number of previous losses that a loss is compared with; no loss is a spike before there are so many."""
    max_not_finite_steps: Size = 10
    """After so many steps in a row whose loss or gradients are not finite, the run ends with status 3, or with
    `on_spike: rollback` is rolled back."""
    max_skips: Count = 20
    """The run ends with status 3 when more of the last `max_skips_within` steps were skipped."""
    max_skips_within: Size = 1000
    """Number of steps over which skipped steps are counted."""
    max_rollbacks: Count = 10
    """Rollbacks allowed over the whole run; instead of one more, it ends with status 3."""


@dataclass
class LoggingConfig:
    """Metrics and console output."""

    interval: Size = 1
    """Steps between lines of metrics.jsonl."""
    print_interval: Size = 10
    """Steps between printed lines where output is not a terminal."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Whether Weights & Biases gets the run: `offline` later, from its folder, `online` at once, `disabled` not."""
    wandb_project: str = "bov_megatron"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, to `tensorboard/` in the run folder."""
    table_interval: Size = 50
    """Steps between statistics of the value tables (row norms, share of rows touched)."""
    peak_flops: Positive | None = None
    """Peak FLOP/s of one device for MFU; `null` means the known value for the device."""


@dataclass
class Recipe:
    """A whole run."""

    name: str = "unnamed"
    """Name of the run; the recipe file's name unless given."""
    output_dir: str = "runs/{name}"
    """Run folder; `{name}` is replaced by the name."""
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """Training engine; `deepspeed` is ZeRO, with AdamW only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir.format(name=self.name))

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.global_batch_size * self.model.sequence_length

    def padded_vocab_size(self) -> int:
        """Rows of embedding, output and tables with padding, a multiple of the tensor-parallel size."""
        multiple = self.parallel.make_vocab_size_divisible_by * self.parallel.tensor_model_parallel_size
        return -(-self.model.vocab_size // multiple) * multiple

    def to_dict(self) -> dict:
        """Nested dicts of plain values, as stored with runs and checkpoints; `recipe_from_dict` reads them back."""
        return dataclasses.asdict(self)
