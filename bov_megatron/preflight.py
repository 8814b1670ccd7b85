"""What a start of training would find, in seconds and without training: `python -m bov_megatron.train RECIPE --check`.

Looks at the world, this machine's devices, the data, the checkpoint to continue from and the disk, and says what is
left to train and what it will cost. It uses the checks that training itself makes at its start, and changes nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bov_megatron.checkpoint import manifest
from bov_megatron.data.prompts import Prompts
from bov_megatron.data.shards import DataSet, check_fingerprints, find_missing_shards, open_data_sets
from bov_megatron.data.tokenizer import load_encoder
from bov_megatron.errors import DONE, BovError, CheckpointError, DataError, RunFolderError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.lease import STALE_SECONDS, current_holder
from bov_megatron.plan import Plan, format_duration, format_size
from bov_megatron.plotting.metrics import read_columns
from bov_megatron.recipe import Recipe

MEASURED_STEPS = 100
"""Last steps of a run that say how long the rest will take."""


@dataclass(frozen=True)
class Finding:
    topic: str
    kind: Literal["ok", "note", "error"]
    text: str


@dataclass
class Preflight:
    """All findings, in the order in which a start would meet them."""

    recipe: Recipe
    plan: Plan
    nodes: int
    findings: list[Finding] = field(default_factory=list)
    exit_status: int = DONE
    """Of the first error: what training would end with."""
    step: int = 0
    """Steps done in the checkpoint to continue from."""

    @property
    def steps_left(self) -> int:
        return max(0, self.plan.steps - self.step)


def preflight(recipe: Recipe, costs: Plan, nodes: int = 1) -> Preflight:
    """Check a start of `recipe` as planned, on `nodes` nodes like this one. Errors are findings."""
    done = Preflight(recipe, costs, nodes)
    stored = _Stored()
    topics: dict[str, Callable[[], Iterator[Finding | str]]] = {
        "world": lambda: _world(done),
        "devices": lambda: _devices(done),
        "checkpoint": lambda: _checkpoint(done, stored),
        "data": lambda: _data(done, stored),
        "disk": lambda: _disk(done),
        "cost": lambda: _cost(done),
    }
    for topic, look in topics.items():
        try:
            for found in look():
                done.findings.append(found if isinstance(found, Finding) else Finding(topic, "ok", found))
        except BovError as error:
            done.findings.append(Finding(topic, "error", str(error)))
            done.exit_status = done.exit_status or error.exit_status
    return done


def format_preflight(done: Preflight) -> str:
    """The findings as an aligned list, and whether training can start."""
    lines = [f"Check of {done.recipe.name} on {done.plan.world_size} ranks", ""]
    for number, found in enumerate(done.findings):
        again = number > 0 and done.findings[number - 1].topic == found.topic
        mark = {"ok": "ok   ", "note": "note ", "error": "ERROR"}[found.kind]
        lines.append(f"{mark}  {'' if again else found.topic:<11} {found.text}")
    errors = sum(found.kind == "error" for found in done.findings)
    verdict = f"{errors} error{'s' if errors > 1 else ''}: training would end with status {done.exit_status}"
    if not errors:
        verdict = "ready to train" if done.steps_left else "ready, but nothing is left to train"
    return "\n".join([*lines, "", verdict])


def _note(topic: str, text: str) -> Finding:
    return Finding(topic, "note", text)


def _world(done: Preflight) -> Iterator[Finding | str]:
    costs = done.plan
    yield (
        f"tensor {costs.tensor_model_parallel_size} × pipeline {costs.pipeline_model_parallel_size} × context "
        f"{costs.context_parallel_size} × data {costs.data_parallel_size}; "
        f"{costs.gradient_accumulation_steps} micro-batches a step on each data-parallel rank"
    )


def _devices(done: Preflight) -> Iterator[Finding | str]:
    import psutil

    from bov_megatron.parallel.device import has_gpu, visible_gpus

    per_node = -(-done.plan.world_size // done.nodes)
    on_device, on_host = done.plan.memory_per_rank_bytes, done.plan.host_memory_per_rank_bytes
    if has_gpu():
        count, name, memory = visible_gpus()
        yield f"{count} × {name}, {format_size(memory)} each; {per_node} ranks a node"
        if per_node > count:
            yield _note("devices", f"{per_node} ranks a node share {count} visible GPUs: start one rank for each GPU")
        if on_device > memory:
            yield _note("devices", _too_large(on_device, "a GPU", memory))
    else:
        yield f"no GPU: {per_node} ranks on the {os.cpu_count()} cores of {socket.gethostname()}"
        on_host += on_device
    available = psutil.virtual_memory().available
    if per_node * on_host > available:
        yield _note("devices", _too_large(per_node * on_host, "this node", available))


def _too_large(needed: int, where: str, available: int) -> str:
    return (
        f"{format_size(needed)} planned (an estimate), {where} has {format_size(available)}: split the model further "
        "(parallel.*), lower train.micro_batch_size, or set parallel.recompute=full"
    )


@dataclass
class _Stored:
    """What the checkpoint to continue from says about the data."""

    tokenizer_hash: str | None = None
    shards: list[str] | None = None


def _checkpoint(done: Preflight, stored: _Stored) -> Iterator[Finding | str]:
    run_dir, topic = done.recipe.run_dir, "checkpoint"
    path = None
    for _, candidate in reversed(run_folder.list_checkpoints(run_dir)):
        if not (damage := _damage(candidate)):
            path = candidate
            break
        yield _note(topic, f"{candidate} is damaged: {damage}; it will be set aside, and the one before is used")
    if path is None:
        if run_folder.list_checkpoints(run_dir):
            raise CheckpointError(f"{run_dir} has no valid checkpoint: restore one from a copy, or set another name=…")
        yield f"none in {run_dir}: from the beginning"
        return
    from bov_megatron.checkpoint import compatibility, differences, loading

    run = loading.read_run(path)
    compatibility.check_same_data_order(run, done.recipe, path)
    compatibility.check_same_model(run["recipe"], done.recipe, path)
    compatibility.check_same_optimizer(run, done.recipe, path)
    done.step = run["step"]
    stored.tokenizer_hash, stored.shards = run["extra"]["tokenizer_hash"], run["extra"]["shards"]
    yield f"{path}: resumes after step {done.step:,} of {done.plan.steps:,}, {done.steps_left:,} to go"
    if changed := differences.find_differences(run["recipe"], done.recipe):
        yield _note(topic, f"{len(changed)} fields differ from its recipe:\n{differences.format_differences(changed)}")
    if not done.steps_left:
        yield _note(topic, "all steps are done; raise train.steps or train.budget_flops, or set another name=…")


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint by its manifest and its files' sizes; training compares checksums as well."""
    try:
        found = manifest.find_damage(path, contents=False)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; the checkpoint must be readable") from None
    if found and found[0].file == manifest.MANIFEST_FILE:
        from bov_megatron.checkpoint import loading

        if loading.is_without_manifest(path):
            return ""
    return str(found[0]) if found else ""


def _data(done: Preflight, stored: _Stored) -> Iterator[Finding | str]:
    recipe = done.recipe
    data_sets = open_data_sets(
        recipe.data, recipe.model.sequence_length, recipe.model.vocab_size, stored.tokenizer_hash
    )
    if stored.shards is not None:
        check_fingerprints(data_sets, stored.shards, done.step)
    weights = [stream.weight for stream in recipe.data.streams] or [1.0]
    for data_set, weight in zip(data_sets, weights, strict=True):
        share = weight / sum(weights)
        yield from _data_set(data_set, share * done.plan.steps * recipe.train.global_batch_size)
    if not any("val" in data_set.manifest.splits for data_set in data_sets):
        data_sets[0].split("val")  # raises
    ids = data_sets[0].manifest.vocab_size
    yield f"tokenizer {data_sets[0].manifest.tokenizer_hash[:12]}: {ids:,} ids"
    if ids < recipe.model.vocab_size:
        unused = recipe.model.vocab_size - ids
        yield _note("data", f"model.vocab_size={recipe.model.vocab_size}: {unused:,} rows stay untrained")
    if recipe.validation.prompts:
        Prompts(recipe, data_sets[0].tokenizer_folder)
        yield f"{len(recipe.validation.prompts)} prompts fit"
    if recipe.evaluation.lists_anything:
        from bov_megatron.evaluation.jobs import check_can_submit
        from bov_megatron.evaluation.suite import Suite

        where = ""
        if recipe.evaluation.where == "slurm":
            check_can_submit()
            where = " by Slurm jobs"
        yield f"to evaluate{where}: {Suite(recipe, data_sets[0].tokenizer_folder).describe()}"


def _data_set(data_set: DataSet, samples_read: float) -> Iterator[Finding | str]:
    found = data_set.manifest
    actual = load_encoder(data_set.tokenizer_folder).hash
    if actual != found.tokenizer_hash:
        raise DataError(
            f"{data_set.tokenizer_folder} is tokenizer {actual[:12]}, but the data set was made with "
            f"{found.tokenizer_hash[:12]}: copy the data set again, or prepare it again with --overwrite"
        )
    shards = 0
    for name in found.splits:
        count, missing = find_missing_shards(data_set, name)
        shards += count
        if missing and not data_set.cache:
            raise DataError(
                f"{len(missing)} of {count} shards are missing or have another size, the first is {missing[0]}: copy "
                "the data set again, or prepare it again with --overwrite"
            )
        if missing:
            yield _note("data", f"{len(missing)} of {count} '{name}' shards are not in the cache yet, and are fetched")
    train = found.splits["train"]
    epochs = samples_read / train.samples
    yield (
        f"{data_set.folder}: {train.samples:,} training samples of {found.sequence_length:,} + 1 tokens, {shards} "
        f"shards; the run reads {epochs:.2f} epochs"
    )
    if epochs > 4:
        yield _note("data", f"the run reads each sample {epochs:.0f} times: more text would help, or fewer steps")


def _disk(done: Preflight) -> Iterator[Finding | str]:
    recipe, run_dir = done.recipe, done.recipe.run_dir
    where = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    yield from _holder(run_dir, now=_time_of_a_write(where))
    if not done.steps_left:
        yield f"{where} can be written"
        return
    size, config = done.plan.checkpoint_bytes, recipe.checkpoint
    stored = [step for step, _ in run_folder.list_checkpoints(run_dir)]
    interval = config.interval or done.plan.steps
    to_come = len(range(done.step // interval, done.plan.steps // interval)) + (done.plan.steps % interval > 0)
    most = min(config.keep_last + 1, len(stored) + to_come)  # a new one is written before an old one is removed
    kept = 0
    if config.keep_every:
        kept = sum(step % config.keep_every == 0 for step in range(interval, done.plan.steps + 1, interval))
    needed = max(1, most + max(0, kept - config.keep_last) - len(stored)) * size
    free = shutil.disk_usage(where).free
    text = f"{format_size(needed)} needed for checkpoints of {format_size(size)}, {format_size(free)} free in {where}"
    if free < size:
        raise RunFolderError(f"{text}: not even one fits. Free space there, or set output_dir=… to another place")
    if free < needed:
        yield _note("disk", f"{text}: free space, or lower checkpoint.keep_last={config.keep_last}")
    else:
        yield text


def _time_of_a_write(folder: Path) -> float:
    """Write a file there and remove it; returns its time on that file system's clock."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-") as probe:
            probe.write(b"x")
            probe.flush()
            return os.stat(probe.name).st_mtime
    except OSError as error:
        raise RunFolderError(
            f"{folder} cannot be written ({error.strerror}): free space or fix its permissions, or set output_dir=… to "
            "another place"
        ) from None


def _holder(run_dir: Path, now: float) -> Iterator[Finding]:
    holder = current_holder(run_dir, now)
    if holder is None or (holder.job is not None and holder.job == os.environ.get("SLURM_JOB_ID")):
        return
    if holder.host == socket.gethostname():
        raise RunFolderError(
            f"run folder {run_dir} is in use: {holder.describe()}. Wait until that run has ended, end it, or "
            "start another one with name=… or output_dir=…"
        )
    yield _note("disk", f"{run_dir} is held by {holder.describe()}: training waits {STALE_SECONDS:.0f} s for a sign")


def _cost(done: Preflight) -> Iterator[Finding | str]:
    recipe, costs = done.recipe, done.plan
    if not done.steps_left:
        yield "nothing"
        return
    tokens = done.steps_left * costs.batch_tokens
    flops = costs.flops_per_token * tokens
    yield f"{done.steps_left:,} steps of {costs.batch_tokens:,} tokens: {tokens:.3g} tokens, {flops:.3g} FLOPs"
    if (seconds := _measured_step(recipe.run_dir)) is not None:
        yield f"{format_duration(done.steps_left * seconds)}, at the run's last steps ({seconds:.3g} s each, median)"
    else:
        share, estimate = done.steps_left / costs.steps, costs.time_estimate
        yield (
            f"{format_duration(share * estimate['seconds'])} if each device does {estimate['mfu']:.0%} of "
            f"{estimate['peak_flops']:.3g} FLOP/s: an assumption, nothing is measured yet"
        )


def _measured_step(run_dir: Path) -> float | None:
    try:
        seconds = read_columns(run_dir, ["step_seconds"]).numbers["step_seconds"]
    except RunFolderError:
        return None
    seconds = seconds[np.isfinite(seconds)][-MEASURED_STEPS:]
    return float(np.median(seconds)) if len(seconds) else None
