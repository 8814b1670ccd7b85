"""How often the host waits for the device in a step."""

import pytest

from bov_megatron.recipe import ValueConfig
from tests.support.distributed import run_ranks
from tests.support.parity import small_model, small_recipe

HELD_OUT = 3
"""Chunks of held-out samples."""


def waits_of_a_rank(rank, world_size, recipe_dict):
    """Names of the torch functions that wait for the device, in order: in a step with its line of metrics, in a step of
    the engine alone, and in a validation. They read a value of a device's tensor, or copy one there from memory that is
    not pinned."""
    import torch
    from torch.overrides import TorchFunctionMode

    from bov_megatron.data.loader import TrainBatch, ValidationBatch
    from bov_megatron.engines.build import build_engine
    from bov_megatron.evaluation import bits_per_byte
    from bov_megatron.parallel import process_groups
    from bov_megatron.recipe import HealthConfig, recipe_from_dict
    from bov_megatron.training.callbacks.slowest_rank import SlowestRank
    from bov_megatron.training.health import Health
    from bov_megatron.training.trainer import Trainer
    from tests.support.parity import batch, my_micro_batches

    waits = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            reads = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")
            if name in reads and args[0].is_floating_point():  # ids are on the host
                waits.append(name)
            if name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None:
                waits.append(name)
            return function(*args, **(kwargs or {}))

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = build_engine(recipe)
    callback = SlowestRank(1)
    trainer = Trainer(engine, [], [callback], torch.ones(recipe.model.vocab_size), Health(HealthConfig()))
    found, records = {}, []
    for step in range(2):
        trainer.batch = TrainBatch(step, my_micro_batches(recipe, batch(step)), "", None)
        waits.clear()
        with Noting():
            records.append(trainer.train_step())
            callback.after_step(trainer, records[-1])
    found["step"] = list(waits)
    waits.clear()
    with Noting():
        engine.train_step(my_micro_batches(recipe, batch(2)))
    found["engine alone"] = list(waits)
    bits_per_byte.HELD_OUT_CHUNK = 1
    held_out = [ValidationBatch(batch(9, 1), torch.ones(1, dtype=torch.bool))] * HELD_OUT
    waits.clear()
    with Noting():
        assert trainer.validate(held_out).tokens == HELD_OUT * world_size * (len(held_out[0].tokens[0]) - 1)
    found["validation"] = list(waits)
    return found, records


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_host_waits_for_the_device_once(optimizer):
    recipe = small_recipe(small_model(value=ValueConfig(source="bank")))
    recipe.optimizer.name, recipe.optimizer.clip_grad = optimizer, 1.0
    for found, records in run_ranks(waits_of_a_rank, 2, recipe.to_dict()):
        assert found["step"] == found["engine alone"] == ["tolist"]
        # A chunk asks whether the run is to stop; the result is read at the end.
        assert found["validation"] == ["tolist"] * (HELD_OUT + 1)
        assert [record["updated"] for record in records] == [True, True]
        assert "data_rank" in records[0] and "slowest_rank" not in records[0]
        assert records[1]["slowest_rank"] in (0, 1), "of the gradients of the step before"
