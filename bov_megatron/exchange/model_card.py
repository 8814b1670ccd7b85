"""What an export says of its model: README.md, and the record of its training that training.json holds too."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from bov_megatron.data.manifest import read_manifest
from bov_megatron.errors import DataError
from bov_megatron.lifecycle import run_folder
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import parameter_specs


def training_record(checkpoint: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the training that led to a checkpoint.

    Args:
        stored: the checkpoint's `read_run`.

    Keys: `step`, `tokens`, `shards` (fingerprints of the training data, None if it has read none of ours), `data` (of
    each data set that is still where it was: path, documents, bytes, tokens), `validation` (step and bits per byte of
    the last one), `evaluations` (of each score under its name in the metrics: step and value, the last ones), and
    `origin` (of a run that was converted); `validation` and `origin` are None where there is none.
    """
    run_dir, recipe, step = run_folder.run_dir_of(checkpoint), stored["recipe"], stored["step"]
    shards = stored["extra"].get("shards")
    origin = run_dir / run_folder.ORIGIN
    scores = _last_scores(run_dir, step)
    validation = scores.pop(_VALIDATION, None)
    return {
        "step": step,
        "tokens": step * recipe["train"]["global_batch_size"] * recipe["model"]["sequence_length"],
        "shards": shards,
        "data": _data(recipe["data"], shards or []),
        "validation": validation and {"step": validation["step"], "bits_per_byte": validation["value"]},
        "evaluations": scores,
        "origin": json.loads(origin.read_bytes()) if origin.is_file() else None,
    }


def _data(data: Mapping[str, Any], shards: list[str]) -> list[dict[str, Any]]:
    found = []
    for path in [data["path"], *(stream["path"] for stream in data["streams"])]:
        with contextlib.suppress(DataError, OSError):
            train = read_manifest(Path(path)).splits["train"] if path else None
            if train and train.index_sha256 in shards:
                counts = {"documents": train.documents, "bytes": train.bytes, "tokens": train.tokens}
                found.append({"path": str(path), **counts, "index_sha256": train.index_sha256})
    return found


_VALIDATION, _EVALUATION = "validation_bits_per_byte", "evaluation/"


def _last_scores(run_dir: Path, step: int) -> dict[str, dict[str, Any]]:
    """Step and value of the last validation and of each evaluation up to `step`, those of jobs of their own too."""
    scores: dict[str, dict[str, Any]] = {}
    for path in (run_dir / run_folder.METRICS, *run_folder.list_evaluations(run_dir)):
        for text in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a last line that a crash cut off
                line = json.loads(text)
                for name, value in line.items():
                    scored = (name == _VALIDATION or name.startswith(_EVALUATION)) and line["step"] <= step
                    if scored and (name not in scores or scores[name]["step"] <= line["step"]):
                        scores[name] = {"step": line["step"], "value": value}
    return scores


def _training_rows(trained: Mapping[str, Any]) -> str:
    """Lines of the card's table."""
    rows = []
    if "step" in trained:
        rows.append(("trained for", f"{trained['step']:,} steps, {trained['tokens']:,} tokens"))
    if validation := trained.get("validation"):
        text = f"{validation['bits_per_byte']:.4f} bits per byte at step {validation['step']:,}"
        rows.append(("held-out text", text))
    for name, score in trained.get("evaluations", {}).items():
        rows.append((f"`{name.removeprefix(_EVALUATION)}`", f"{score['value']:.4f} at step {score['step']:,}"))
    for data in trained.get("data", ()):
        text = f"{data['documents']:,} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens"
        rows.append(("training data", f"{text}; shards {data['index_sha256'][:12]}"))
    if origin := trained.get("origin"):
        rows.append(("made from", f"`{origin.get('nanochat') or origin.get('export')}`, step {origin['step']:,}"))
    return "".join(f"| {name} | {text} |\n" for name, text in rows)


TABLES = {None: "", "bf16": ", value tables bfloat16", "int8": ", value tables int8 with a bfloat16 scale per row"}


def model_card(
    model: ModelConfig,
    dtype: torch.dtype,
    recipe: Mapping | None = None,
    trained: Mapping | None = None,
    stored_tables: str | None = None,
) -> str:
    """README.md of an export. `recipe`, `trained` and `stored_tables` as for `export` (there `tables`)."""
    specs = parameter_specs(model)
    tables = sum(spec.size for spec in specs if spec.kind == "table")
    layers = ", ".join(map(str, model.layers_from_source())) or "none"
    name = recipe["name"] if recipe and recipe.get("name") else "Bank-of-Values model"
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bank-of-values]
---

# {name}

A decoder trained with bov_megatron; its attention values follow "Do Value Vectors in Deep Layers Need Context from
the Residual Stream?" (arXiv 2606.02780).

| | |
|---|---|
| value source | `{model.value.source}` in layers {layers}; coefficient {model.value.coefficient} |
| parameters | {sum(spec.size for spec in specs):,}, of which {tables:,} in value tables |
| layers / hidden size / heads / key-value heads | {model.num_layers} / {model.hidden_size} / \
{model.num_attention_heads} / {model.kv_heads} |
| vocabulary / sequence length | {model.vocab_size:,} / {model.sequence_length:,} |
| weights stored as | {str(dtype).removeprefix("torch.")}{TABLES[stored_tables]} |
{_training_rows(trained or {})}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer(tokenizer.bos_token + "The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Documents start with the beginning-of-sequence token in training: start prompts with it. Layers that take their values
from a bank keep none in the cache; `cache_implementation="static"` is therefore refused.
"""
    if recipe is not None:
        card += f"\n## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```\n"
    return card
