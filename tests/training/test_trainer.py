"""How often the host waits for the device in a step."""

import pytest

from bov_megatron.recipe import ValueConfig
from tests.support.distributed import run_ranks
from tests.support.parity import small_model, small_recipe


def waits_of_a_step(rank, world_size, recipe_dict):
    """Names of the torch functions of one step that read a value of a device's tensor, in order."""
    import torch
    from torch.overrides import TorchFunctionMode

    from bov_megatron.data.loader import TrainBatch
    from bov_megatron.engines.build import build_engine
    from bov_megatron.parallel import process_groups
    from bov_megatron.recipe import HealthConfig, recipe_from_dict
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
            return function(*args, **(kwargs or {}))

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = build_engine(recipe)
    trainer = Trainer(engine, [], [], torch.ones(recipe.model.vocab_size), Health(HealthConfig()))
    records = []
    for step in range(2):
        micro_batches = my_micro_batches(recipe, batch(step))
        trainer.batch = TrainBatch(step, micro_batches, "", None)
        waits.clear()
        with Noting():
            records.append(trainer.train_step())
    return waits, [record["updated"] for record in records]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_host_waits_for_the_device_once(optimizer):
    recipe = small_recipe(small_model(value=ValueConfig(source="bank")))
    recipe.optimizer.name, recipe.optimizer.clip_grad = optimizer, 1.0
    for waits, updated in run_ranks(waits_of_a_step, 2, recipe.to_dict()):
        assert waits == ["tolist"] and updated == [True, True]
