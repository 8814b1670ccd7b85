"""One rank's step: the real code, on fake tensors and in fake process groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bov_megatron.data.loader import TrainBatch
from bov_megatron.engines import base
from bov_megatron.engines.host_rows import HostRows
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.errors import RecipeError
from bov_megatron.model import attention_blocks, core_attention, weight_gradients
from bov_megatron.model.bank import host_tables, lookup_ahead, table
from bov_megatron.model.output import OutputLayer, _TokenLoss
from bov_megatron.optim.optimizer import BovOptimizer
from bov_megatron.parallel import device, process_groups
from bov_megatron.recipe import Recipe, data_parallel_size
from bov_megatron.simulation.as_gpu import as_gpu, patched
from bov_megatron.simulation.collectives import Collective, fake_world
from bov_megatron.simulation.memory import HOST
from bov_megatron.simulation.tracker import Counts, Tracker
from bov_megatron.training.health import Health
from bov_megatron.training.trainer import Trainer

KINDS = ("weights", "gradients", "optimizer", "activations", "lookups", "loss", "buffers")
"""Of memory: `activations` are all of forward and backward pass but lookups and loss, `buffers` what reduction, update
and gathering allocate."""
# Functions that allocate memory of a kind; the innermost counts.
_ALLOCATE = (
    (MegatronEngine, "forward_backward", "activations"),
    (OutputLayer, "forward", "loss"),
    (_TokenLoss, "backward", "loss"),
    (lookup_ahead.LookupsAhead, "__init__", "lookups"),
    (lookup_ahead.LookupsAhead, "add_gradient", "lookups"),
    (lookup_ahead.LookupsAhead, "finish", "lookups"),
    (table._AccumulatingLookup, "backward", "lookups"),
    (MegatronEngine, "_finalize_gradients", "buffers"),
    (HostRows, "begin", HOST),
    (HostRows, "reduce", HOST),
    (BovOptimizer, "gradient_norm", "buffers"),
    (BovOptimizer, "step", "buffers"),
)


@dataclasses.dataclass
class Measured:
    """A step of this rank."""

    memory: dict[str, dict[str, int]]
    """Bytes by kind at the peak of each phase: `forward and backward` (with the gradients' reduction) and `update`."""
    host_memory: int
    collectives: list[Collective]
    counts: Counts
    place: dict[str, int]
    """Rank within its `tensor`, `context`, `data` and `pipeline` group."""
    groups: dict[str, list[int]]
    """Global ranks of this rank's groups, by name."""

    def name_of_group(self, collective: Collective) -> str:
        """The first group of these ranks, or `others`."""
        if collective.kind in ("send", "recv"):  # on groups of their own, so that they don't wait for each other
            return "pipeline"
        return next((name for name, ranks in self.groups.items() if tuple(ranks) == collective.group), "others")


def simulated(recipe: Recipe, world_size: int, rank: int, gpu: bool = True) -> Measured:
    """A step of `rank` among `world_size` ranks, of which the others don't exist.

    Args:
        gpu: as on a GPU, with compiled regions and flash attention; else as on the CPU, uncompiled.

    Raises RecipeError where the layout doesn't fit the world, or cannot be simulated.
    """
    if recipe.engine == "deepspeed":
        raise RecipeError(
            "engine=deepspeed: only Megatron's engine can be simulated, because DeepSpeed starts process groups and "
            "kernels of its own; use `bov plan`, or engine=megatron"
        )
    if device.has_gpu():
        raise RecipeError("a simulation needs a process that sees no GPU: set CUDA_VISIBLE_DEVICES= for it")
    data_parallel_size(recipe, world_size)  # raises
    if not 0 <= rank < world_size:
        raise RecipeError(f"rank {rank} is not in a world of {world_size}: ranks are 0 to {world_size - 1}")
    # Regions have a stand-in of their own.
    uncompiled = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile=False))
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(fake_world(rank, world_size))
            process_groups.initialize(uncompiled, rank, world_size)
            fake_mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            tracker = stack.enter_context(Tracker("buffers", fake_mode))
            stack.enter_context(_without_values(tracker))
            if gpu:
                stack.enter_context(as_gpu(recipe, tracker))
            return measured_step(uncompiled, tracker)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        core_attention._band.cache_clear()  # their masks are fake
        attention_blocks._edge.cache_clear()


def measured_step(recipe: Recipe, tracker: Tracker) -> Measured:
    """Build the engine and take a step, within `tracker` and the recipe's process groups."""
    with _kinds(tracker):
        engine = MegatronEngine(recipe)
        host_rows = engine.host_rows
        if tracker.fake_mode is not None and host_rows.tables and host_rows.group.size() > 1 and not host_rows.sharded:
            raise RecipeError(
                "model.value.table_memory=host: tables that every data-parallel rank updates whole, as they are small "
                "or parallel.use_distributed_optimizer is false, cannot be simulated; use model.value.table_memory="
                "device, or one data-parallel rank"
            )
        _set_kinds(engine, tracker)
        trainer = Trainer(engine, (), (), torch.zeros(recipe.model.vocab_size), Health(recipe.health))
        # Weights that arrive in the background are on their way at the start of every step but the first.
        for _ in range(2 if recipe.parallel.overlap_param_gather else 1):
            measured = _step(trainer, tracker)
    return measured


def _step(trainer: Trainer, tracker: Tracker) -> Measured:
    peaks: dict[str, dict[str, int]] = {}
    tracker.counts, tracker.messages = Counts(), []
    batches = _MicroBatches(trainer.recipe, tracker)
    trainer.batch = TrainBatch(trainer.step, batches, "", np.zeros((0, 2), np.int64))
    trainer.throughput.start()
    with (
        _phase(trainer.engine, "forward_backward", tracker, peaks, "forward and backward"),
        _phase(trainer.engine, "update", tracker, peaks, "update"),
    ):
        trainer.train_step()
    counts, messages = batches.extrapolated()
    return Measured(peaks, tracker.memory.bytes[HOST], messages, counts, *_layout())


def _layout() -> tuple[dict[str, int], dict[str, list[int]]]:
    """Place and groups of `Measured`."""
    state = parallel_state
    groups = {
        "tensor": state.get_tensor_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(with_context_parallel=True),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "model": state.get_model_parallel_group(),
        "world": dist.group.WORLD,
    }
    place = {name: groups[name].rank() for name in ("tensor", "context", "pipeline")}
    place["data"] = state.get_data_parallel_rank()
    return place, {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


@contextlib.contextmanager
def _phase(engine, method: str, tracker: Tracker, peaks: dict, name: str) -> Iterator[None]:
    original = getattr(engine, method)

    def run(*arguments):
        with tracker.memory.phase(peaks, name):
            return original(*arguments)

    setattr(engine, method, run)
    yield
    delattr(engine, method)


class _MicroBatches(list):
    """A step's micro-batches, of which a simulation runs only the first ones.

    Without an interleaved pipeline all those of the steady state are alike: a later one adds what the last one did.
    """

    def __init__(self, recipe: Recipe, tracker: Tracker):
        layout, train = recipe.parallel, recipe.train
        data_parallel = parallel_state.get_data_parallel_world_size()
        number = train.global_batch_size // train.micro_batch_size // data_parallel
        ahead = layout.pipeline_model_parallel_size - 1 - parallel_state.get_pipeline_model_parallel_rank()
        alike = tracker.fake_mode is not None and layout.virtual_pipeline_model_parallel_size == 1
        run = min(number, ahead + 3) if alike else number
        with tracker.on_host():
            ids = _ids(train.micro_batch_size, recipe.model.sequence_length + 1, recipe.model.vocab_size)
            self.of_whole_step = [(ids + shift) % recipe.model.vocab_size for shift in range(number)]
        super().__init__(self.of_whole_step[:run])
        self.left_out, self.tracker = number - run, tracker
        self._starts: list[tuple[Counts, int]] = []

    def __iter__(self):
        for ids in super().__iter__():
            self._starts.append((dataclasses.replace(self.tracker.counts), len(self.tracker.messages)))
            yield ids

    def extrapolated(self) -> tuple[Counts, list[Collective]]:
        """Counts and collectives since the start, with those of the micro-batches that were left out."""
        counts, messages = self.tracker.counts, self.tracker.messages
        if not self.left_out:
            return counts, messages
        (before, first), (after, last) = self._starts[-2:]
        one = after.plus(before, times=-1)
        return counts.plus(one, times=self.left_out), messages + messages[first:last] * self.left_out


def _ids(rows: int, columns: int, vocab_size: int) -> Tensor:
    """Token ids with as many distinct ones as there can be, evenly over the vocabulary."""
    inputs = rows * (columns - 1)
    ids = torch.arange(inputs) * max(vocab_size, inputs) // inputs % vocab_size
    return torch.nn.functional.pad(ids.view(rows, columns - 1), (0, 1))


def _set_kinds(engine: MegatronEngine, tracker: Tracker) -> None:
    """Of what is there between steps."""
    optimizer, memory = engine.optimizer, tracker.memory
    memory.set_kind((buffer.grad_data for chunk in engine.wrapped for buffer in chunk.buffers), "gradients")
    memory.set_kind((entry[-1] for entry in (*optimizer.state_tensors(), *optimizer.second_moments())), "optimizer")
    memory.set_kind((local.parameter for local in engine.local_parameters()), "weights")
    on_host = [shard for shard in optimizer.parameters if shard.local.on_host]
    memory.set_kind((tensor for shard in on_host for tensor in (shard.local.parameter, shard.main)), HOST)
    memory.set_kind((entry[-1] for entry in optimizer.state_tensors() if entry[1].local.on_host), HOST)


@contextlib.contextmanager
def _kinds(tracker: Tracker) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, kind in _ALLOCATE:
            stack.enter_context(_replaced(owner, name, functools.partial(_in_kind, tracker, kind=kind)))
        yield


def _replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> contextlib.AbstractContextManager[None]:
    original = vars(owner)[name]
    if isinstance(original, staticmethod):
        return patched(owner, name, staticmethod(wrap(original.__func__)))
    return patched(owner, name, wrap(original))


def _in_kind(tracker: Tracker, function: Callable, kind: str) -> Callable:
    @functools.wraps(function)
    def run(*arguments, **options):
        with tracker.memory.of_kind(kind):
            return function(*arguments, **options)

    return run


class _AtOnce:
    """In place of the thread that adds gradients to host tables: fake tensors belong to one thread."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def submit(self, function: Callable[[], None]) -> Future:
        done: Future = Future()
        with self.tracker.uncounted():
            function()
        done.set_result(None)
        return done


@contextlib.contextmanager
def _without_values(tracker: Tracker) -> Iterator[None]:
    """Leave weights uninitialised, copy real tensors to the device as fake ones, and do on the host what needs numbers:
    distinct ids, rows, and whether weight gradients add up."""

    def distinct(original: Callable) -> Callable:
        def of(ids_BS: Tensor, table: Any):
            with tracker.on_host():
                found = original(ids_BS, table)
            for tensor in (found.own_blocks, found.inverse_SB):
                tracker.memory.add(tensor)
            return found

        return of

    def on_host(original: Callable) -> Callable:
        def run(first: Any, *ids: Any):
            with tracker.on_host():
                return original(first, *(i.of_whole_step if isinstance(i, _MicroBatches) else i for i in ids))

        return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(HostRows, "_rows_of", on_host))
        stack.enter_context(_replaced(HostRows, "_ask", on_host))
        stack.enter_context(patched(base, "initialize_weights", lambda chunk: None))
        stack.enter_context(_replaced(weight_gradients, "adds_exactly", on_host))
        stack.enter_context(_replaced(lookup_ahead._Distinct, "of", distinct))
        stack.enter_context(patched(host_tables, "_adder", lambda: _AtOnce(tracker)))
        to_device = device.to_device
        for name, module in list(sys.modules.items()):
            if name.startswith("bov_megatron.") and vars(module).get("to_device") is to_device:
                stack.enter_context(patched(module, "to_device", tracker.to_device))
        yield
