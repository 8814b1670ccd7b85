"""Transformer Engine's linear layers: refused where they are missing; what they add to a state is not stored.

Transformer Engine itself needs a GPU to be built and imported: its layers are not run here.
"""

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from bov_megatron.errors import RecipeError
from bov_megatron.model import linear, spec
from bov_megatron.recipe import load_recipe, recipe_from_dict
from tests.support import runs
from tests.support.distributed import run_ranks

without_te = pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")


def recipe(*changes: str):
    return load_recipe(runs.SMOKE, ["data.path=unused", "parallel.tensor_model_parallel_size=1", *changes])


@without_te
@pytest.mark.parametrize("fp8", ["none", "tensorwise", "mxfp8"])
def test_missing_transformer_engine_is_refused_before_anything_trains(prepared_data, tmp_path, fp8):
    changes = ["model.linear_layers=transformer_engine", f"train.fp8={fp8}", "train.precision=bf16"]
    ((status, said),) = runs.launch(1, runs.overrides(prepared_data, tmp_path / "run", *changes))
    assert status == 2
    assert "Transformer Engine is not installed" in said and "set model.linear_layers=megatron" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@without_te
def test_megatron_itself_would_train_without_fp8_in_silence():
    """The trap: an FP8 configuration is taken, and its context does nothing."""
    import contextlib

    from megatron.core.fp8_utils import get_fp8_context

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, fp8="hybrid", fp8_recipe="tensorwise", bf16=True
    )
    assert isinstance(get_fp8_context(config), contextlib.nullcontext)


def test_settings_that_megatron_is_given():
    changes = ["model.linear_layers=transformer_engine", "train.precision=bf16"]
    config = spec.transformer_config(recipe(*changes, "train.fp8=blockwise"))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", "blockwise", False)
    assert spec.transformer_config(recipe(*changes)).fp8 is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.fp8=tensorwise"], "train.fp8=tensorwise needs model.linear_layers=transformer_engine"),
        (
            ["train.fp8=mxfp8", "model.linear_layers=transformer_engine", "train.precision=fp32"],
            "train.fp8=mxfp8 needs train.precision=bf16, found 'fp32'",
        ),
        (["train.fp8=delayed"], "train.fp8='delayed' is unknown"),
        (["model.linear_layers=te"], "model.linear_layers='te' is unknown"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*changes)


def _weights_of_layers_with_extra_state(rank, world_size, description):
    """Linear layers that add a state of their own, as Transformer Engine's do, in place of Megatron's."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    class WithExtraState(linear.ColumnParallelLinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._load_state_dict_pre_hooks.clear()  # Megatron's own, which Transformer Engine's layers don't have

        def get_extra_state(self):
            return torch.tensor([7])

        def set_extra_state(self, state):
            assert state is None

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            key = f"{prefix}_extra_state"
            extra = ShardedObject(key, self.get_extra_state(), (1,), (0,))
            return {**super().sharded_state_dict(prefix, sharded_offsets, metadata), key: extra}

    recipe = recipe_from_dict(description)
    process_groups.initialize(recipe, rank, world_size)
    plain = MegatronEngine(recipe, with_optimizer=False)
    spec.linear_layers = lambda recipe: (WithExtraState, linear.RowParallelLinear)
    engine = MegatronEngine(recipe, with_optimizer=False)
    stored = [e.sharded_state_dict({"dp_cp_group": None})["model"] for e in (plain, engine)]
    weights = {"0": dict(plain.model.named_parameters())}
    engine.load_state(weights, None)
    return [set(state["0"]) for state in stored]


def test_extra_state_is_neither_stored_nor_asked_for():
    description = recipe("train.precision=fp32").to_dict()
    ((plain, with_extra_state),) = run_ranks(_weights_of_layers_with_extra_state, 1, description)
    assert with_extra_state == plain
    assert not any(key.endswith(linear.EXTRA_STATE) for key in plain)
