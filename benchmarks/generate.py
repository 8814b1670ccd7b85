"""Generation by the exported model: bank against projection, in tokens per second and in memory of values.

The bank's layers cache no values and have tables instead, whose size doesn't grow: from some context length on they
are the smaller ones. Shapes: B sequences, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.generate_plot import draw
from benchmarks.timing import Spread, speed_ratio, take_turns
from benchmarks.training_step import CPU_MODEL, QUICK_MODEL
from bov_megatron.parallel.device import device, has_gpu
from bov_megatron.recipe import ModelConfig, ValueConfig

BATCH, PROMPT, NEW = 8, 256, 32
QUICK_BATCH, QUICK_PROMPT, QUICK_NEW = 2, 16, 2
IN_FILE = "bank, tables in their file"
PAIRS = (("bank", "projection"), (IN_FILE, "bank"))


def bench_generate(turns: int, quick: bool, picture: Path) -> dict:
    """A random model of each source (as in `step`), a batch of random prompts, then one token at a time.

    Args:
        picture: where to draw memory against context length.
    """
    batch, prompt, new = (QUICK_BATCH, QUICK_PROMPT, QUICK_NEW) if quick else (BATCH, PROMPT, NEW)
    with tempfile.TemporaryDirectory() as folder:
        models = _models(quick, folder)
        vocab_size = models["bank"].config.vocab_size
        ids_BT = torch.randint(vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device())
        runs = {name: _Run(model, ids_BT) for name, model in models.items()}
        prefill = take_turns({name: lambda turn, run=run: run.prefill() for name, run in runs.items()}, turns)
        decode = take_turns({name: lambda turn, run=run: run.decode(new) for name, run in runs.items()}, turns)
        variants = {
            name: {
                "prefill_tokens_per_second": Spread.of([batch * prompt / s for s in prefill[name].wall]),
                "decode_tokens_per_second": Spread.of([batch * new / s for s in decode[name].wall]),
                "cache_bytes_per_token": cache_bytes(run.cache) // (batch * run.cache.get_seq_length()),
                **table_bytes(run.model),
                "row_bytes_on_the_device": row_bytes(run.cache),
                "continuations": run.tokens,
            }
            for name, run in runs.items()
        }
        saved = variants["projection"]["cache_bytes_per_token"] - variants["bank"]["cache_bytes_per_token"]
        break_even = variants["bank"]["table_bytes_on_the_device"] / (saved * batch)
        contexts = [max(1, int(break_even * share)) for share in (0.125, 0.5, 1.0, 1.5)]
        memory = {name: _measured_memory(model, batch, contexts) for name, model in models.items()}
    draw(picture, memory, batch, break_even, vocab_size)
    ratios = {
        f"{phase}: {ours} / {theirs}": speed_ratio(timings, ours, theirs)
        for phase, timings in (("prefill", prefill), ("decode", decode))
        for ours, theirs in PAIRS
    }
    return {
        "sequences": batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "variants": variants,
        **ratios,
        "bank_saves_memory_from_tokens": {"measured": break_even, "V / B": vocab_size / batch},
        "bytes_by_context": memory,
        "picture": str(picture),
    }


def cache_bytes(cache) -> int:
    """Of all tensors of a live cache: keys, values and token ids."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def row_bytes(cache) -> int:
    """Of rows that a live cache keeps, of tables that are not on the device, with their ids."""
    return sum(tensor.nbytes for kept in cache.rows.values() for tensor in kept)


def table_bytes(model) -> dict[str, int]:
    """Of value tables, by where they are."""
    own = sum(tensor.nbytes for name, tensor in model.named_parameters() if "value_table" in name)
    outside = sum(tensor.nbytes for _, table in model.tables() for tensor in table.outside.values())
    return {"table_bytes_on_the_device": own, "table_bytes_in_the_file": outside}


def _models(quick: bool, folder: str) -> dict:
    from bov_megatron.exchange.export import hf_config
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    sizes = QUICK_MODEL if quick else {} if has_gpu() else CPU_MODEL
    dtype = torch.bfloat16 if has_gpu() else torch.float32
    models = {}
    for source in ("projection", "bank"):
        torch.manual_seed(0)
        model = BovForCausalLM(hf_config(ModelConfig(**sizes, value=ValueConfig(source=source))))
        for parameter in model.parameters():  # matrices that start at zero would hide differences
            torch.nn.init.normal_(parameter, std=0.05)
        models[source] = model.to(device(), dtype).eval()
    models["bank"].save_pretrained(folder)
    mapped = BovForCausalLM.from_pretrained(folder, bank_device="mmap", dtype=dtype)
    return models | {IN_FILE: mapped.to(device()).eval()}


class _Run:
    """One model with its cache and the tokens it has continued the prompts with."""

    def __init__(self, model, ids_BT: torch.Tensor):
        self.model, self.ids_BT = model, ids_BT
        self.cache, self.next_B1, self.tokens = None, ids_BT[:, :1], []

    @torch.no_grad()
    def prefill(self) -> None:
        output = self.model(self.ids_BT, use_cache=True, logits_to_keep=1)
        self.cache, self.next_B1 = output.past_key_values, output.logits.argmax(-1)

    @torch.no_grad()
    def decode(self, new: int) -> None:
        """Greedily, from behind the prompt."""
        self.cache.crop(self.ids_BT.size(1))
        next_B1, tokens = self.next_B1, []
        for _ in range(new):
            tokens.append(next_B1)
            next_B1 = self.model(next_B1, past_key_values=self.cache).logits.argmax(-1)
        self.tokens = torch.cat(tokens, 1).tolist()


@torch.no_grad()
def _measured_memory(model, batch: int, contexts: list[int]) -> dict[int, int]:
    """Bytes of cache, tables and rows on the device at each length, of one cache that grows."""
    sizes, cache, length = {}, None, 0
    generator = torch.Generator().manual_seed(1)
    for context in contexts:
        ids_BT = torch.randint(model.config.vocab_size, (batch, context - length), generator=generator)
        output = model.model(ids_BT.to(device()), past_key_values=cache, use_cache=True)
        cache, length = output.past_key_values, context
        sizes[context] = cache_bytes(cache) + row_bytes(cache) + table_bytes(model)["table_bytes_on_the_device"]
    return sizes
