"""An export says what its model was trained on, for how long, and how good it was."""

import json

import torch

from bov_megatron.data.manifest import read_manifest
from bov_megatron.exchange.model_card import model_card, training_record
from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig


def record(prepared_data, run_dir, step):
    """Of a run that was converted at step 5 and has trained on, validated and evaluated at 6 and 8, by a job of its own
    too, and was cut off in a line."""
    (run_dir / "evaluations").mkdir(parents=True)
    lines = [
        json.dumps({"step": n, "loss": 4.0, "validation_bits_per_byte": n / 2, "evaluation/core": n / 100, "tokens": 9})
        for n in (6, 8)
    ]
    for n in (5, 6, 8):
        score = {"step": n, "evaluation/bits_per_byte/code": n / 10, "evaluation_seconds": 3.0}
        (run_dir / f"evaluations/step_{n:08d}.json").write_text(json.dumps(score))
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "loss": 3.']))
    (run_dir / "origin.json").write_text(json.dumps({"nanochat": "/a/model_000005.pt", "step": 5}))
    recipe = Recipe(model=ModelConfig(sequence_length=256, value=ValueConfig(source="bank")))
    recipe.train.global_batch_size, recipe.data.path = 4, str(prepared_data.folder)
    shards = [read_manifest(prepared_data.folder).splits["train"].index_sha256]
    stored = {"step": step, "recipe": recipe.to_dict(), "extra": {"shards": shards}}
    return recipe, training_record(run_dir / "checkpoints" / f"step_{step:08d}", stored)


def test_the_card_holds_the_record(prepared_data, tmp_path):
    recipe, trained = record(prepared_data, tmp_path / "run", 7)
    assert (trained["tokens"], trained["validation"]) == (7 * 4 * 256, {"step": 6, "bits_per_byte": 3.0})
    card = model_card(recipe.model, torch.float32, recipe.to_dict(), trained)
    train = read_manifest(prepared_data.folder).splits["train"]
    for row in (
        "| trained for | 7 steps, 7,168 tokens |",
        "| held-out text | 3.0000 bits per byte at step 6 |\n| `core` | 0.0600 at step 6 |\n"
        "| `bits_per_byte/code` | 0.6000 at step 6 |\n",
        f"| training data | {train.documents:,} documents, {train.bytes:,} bytes, {train.tokens:,} tokens; shards "
        f"{train.index_sha256[:12]} |",
        "| made from | `/a/model_000005.pt`, step 5 |\n\n```python",
        "| parameters | 233,570,333, of which 100,663,296 in value tables |",
    ):
        assert row in card, row


def test_data_that_is_not_there_or_not_the_same_is_left_out(prepared_data, other_prepared_data, tmp_path):
    recipe, _ = record(prepared_data, tmp_path / "run", 8)
    for path in ("nowhere", str(other_prepared_data.folder), None):
        recipe.data.path = path
        stored = {"step": 8, "recipe": recipe.to_dict(), "extra": {"shards": ["0" * 64]}}
        found = training_record(tmp_path / "run" / "checkpoints" / "step_00000008", stored)
        assert found["data"] == [] and found["validation"] == {"step": 8, "bits_per_byte": 4.0}
