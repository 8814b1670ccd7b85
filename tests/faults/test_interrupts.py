"""Ctrl-C at random moments of the whole life of a command: never a traceback, the right exit status, nothing lost."""

import json
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bov_megatron.data.manifest import read_manifest
from bov_megatron.lifecycle import run_folder
from tests.support.interrupts import PATIENCE, Command, Ended, tool
from tests.support.results import same_as
from tests.support.runs import SMOKE, overrides, train

SEED = 20261125
MOMENTS = int(os.environ.get("BOV_INTERRUPTS", "20"))
"""Of each command."""
RUN = ["train.steps=600", "checkpoint.interval=0", "validation.interval=200", "logging.wandb=offline"]
RUN += ["parallel.tensor_model_parallel_size=1"]


class Interrupts:
    """Runs one command again and again, each time interrupted at another random moment of its life."""

    def __init__(self, arguments, folder: Path, say, **environ: str):
        self.arguments, self.folder, self.say, self.environ = arguments, folder, say, environ
        self.chance = random.Random(SEED)
        self.life, self.sent = 0.0, 0
        """Seconds of the whole command, and how often it was interrupted."""
        say(f"seed {SEED}")

    def undisturbed(self) -> None:
        """Measure how long the command takes from its first own code to its end."""
        with Command(self.arguments, self.folder / "undisturbed.log", **self.environ) as command:
            command.wait_for(command.hears)
            began = time.monotonic()
            command.end().check(0)
        self.life = time.monotonic() - began
        self.say(f"undisturbed: {self.life:.1f} s")

    def moments(self) -> Iterator[float]:
        """One in each part of the command's life, as a share of it, in random order. Fails after the last one where all
        of them were too late."""
        shares = [(part + self.chance.random()) / MOMENTS for part in range(MOMENTS)]
        self.chance.shuffle(shares)
        yield from shares
        assert self.sent, "the command had always ended before"

    def at(self, moment: float, *statuses: int, whole: bool = True) -> Ended:
        """How the command ends that is interrupted at a moment of its life.

        Args:
            whole: False where an earlier call may have done a part of its work.
        """
        with Command(self.arguments, self.folder / "log", **self.environ) as command:
            command.wait_for(command.hears)
            began = time.monotonic()
            command.sleep(moment * self.life)
            seconds = time.monotonic() - began
            if command.process.poll() is None:
                self.sent += 1
            elif whole:
                self.life = seconds  # the machine is less busy than before
            ended = command.interrupt().check(*statuses)
        last = (ended.output.splitlines() or [""])[-1]
        self.say(f"after {seconds:5.1f} s: status {ended.status:3}, {ended.took:4.1f} s later; {last[:90]}")
        return ended


def steps_saved(run_dir: Path, before: int) -> int:
    """How many; fails where a step in the metrics is not in the newest checkpoint, or one from before is gone."""
    newest, metrics = run_folder.latest_checkpoint(run_dir), run_dir / run_folder.METRICS
    saved = run_folder.step_of(newest) if newest else 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    assert saved == max((line["step"] for line in lines), default=0) >= before
    return saved


def interrupt_training(run_dir: Path, interrupts: Interrupts, undisturbed: Path, statuses: tuple[int, ...]) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    interrupts.undisturbed()
    interrupts.say(same_as(undisturbed, run_dir))
    shutil.rmtree(run_dir)
    steps, ends = 0, 0
    for moment in interrupts.moments():
        ended = interrupts.at(moment, *statuses, 0, whole=steps == 0)
        steps = steps_saved(run_dir, before=steps)
        assert not (run_dir / run_folder.LEASE).exists()
        if ended.status == 0:
            ends += 1
            interrupts.say(same_as(undisturbed, run_dir))
            shutil.rmtree(run_dir)
            steps = 0
    if not ends:
        interrupts.undisturbed()
        interrupts.say(same_as(undisturbed, run_dir))


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    """Of one rank, and of two."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"undisturbed{ranks}")
        train(ranks, overrides(prepared_data, folders[ranks], *RUN, "logging.wandb=disabled"), timeout=3 * PATIENCE)
    return folders


def test_training_in_one_process(prepared_data, undisturbed, tmp_path, say):
    """Ctrl-C at random moments, the run started again each time; then compared with one never interrupted."""
    command = [sys.executable, "-m", "bov_megatron.train", SMOKE, *overrides(prepared_data, tmp_path / "run", *RUN)]
    interrupt_training(tmp_path / "run", Interrupts(command, tmp_path, say), undisturbed[1], (143,))


def test_training_under_torchrun(prepared_data, undisturbed, tmp_path, say):
    """The same with two ranks: torchrun is in the terminal's foreground, its ranks are not."""
    run = overrides(prepared_data, tmp_path / "run", *RUN)
    command = tool("torchrun", "--nproc-per-node", "2", "--shutdown-timeout", "200", SMOKE, *run)
    # Before its ranks, torchrun is a tool like others.
    interrupt_training(tmp_path / "run", Interrupts(command, tmp_path, say), undisturbed[2], (143, 130))


def test_training_under_srun(cluster, prepared_data, undisturbed, tmp_path, say):
    """The same with a rank on each of two nodes; srun passes it on."""
    run = overrides(prepared_data, tmp_path / "run", *RUN)
    srun = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--disable-status"]
    command = [*srun, sys.executable, "-m", "bov_megatron.train", SMOKE, *run]
    environ = {**cluster.environ, "MASTER_ADDR": "127.0.0.1"}
    interrupts = Interrupts(command, tmp_path, say, **environ)
    # Before the tasks have begun, srun cancels the step itself.
    interrupt_training(tmp_path / "run", interrupts, undisturbed[2], (143, 130, 1))


def test_preparation(prepared_data, tmp_path, say):
    """Ctrl-C at random moments, the same command run again each time; then compared with one never interrupted."""
    text = [Path(sysconfig.get_path("stdlib"), name) for name in ("asyncio", "unittest", "email")]

    def command(out: Path):
        options = ["--unit-bytes", "20000", "--workers", "2", "--quiet"]
        options += ["--sequence-length", "256", "--validation-fraction", "0.1"]
        return tool("prepare_data", *text, "--tokenizer", prepared_data.tokenizer, "--out", out, *options)

    Interrupts(command(tmp_path / "whole"), tmp_path, say).undisturbed()
    interrupts = Interrupts(command(tmp_path / "data"), tmp_path, say)
    interrupts.undisturbed()
    shutil.rmtree(tmp_path / "data")
    for moment in interrupts.moments():
        if interrupts.at(moment, 130, 0, whole=not (tmp_path / "data").exists()).status == 0:
            assert read_manifest(tmp_path / "data") == read_manifest(tmp_path / "whole")
            shutil.rmtree(tmp_path / "data")
    interrupts.undisturbed()
    assert read_manifest(tmp_path / "data") == read_manifest(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["manifest.json", "tokenizer", "train", "val"]


@pytest.fixture(scope="module")
def run_dir(prepared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(1, overrides(prepared_data, folder, "train.steps=1", "validation.interval=0"))
    return folder


def test_conversion(run_dir, tmp_path, say):
    """Ctrl-C at random moments: the export is complete or not there, and nothing lies beside it."""
    out = tmp_path / "out"
    out.mkdir()
    interrupts = Interrupts(tool("convert", "to-hf", run_dir, out / "export"), tmp_path, say)
    interrupts.undisturbed()
    files = sorted(path.name for path in (out / "export").iterdir())
    for moment in interrupts.moments():
        shutil.rmtree(out / "export", ignore_errors=True)
        interrupts.at(moment, 130, 0)
        assert [path.name for path in out.iterdir()] in ([], ["export"])
        if (out / "export").exists():
            assert sorted(path.name for path in (out / "export").iterdir()) == files


def test_evaluation(run_dir, prepared_data, tmp_path, say):
    """Ctrl-C at random moments: scores or none."""
    from bov_megatron.exchange.convert import to_hf

    to_hf(run_dir, tmp_path / "export", check_parity=False)
    scores = tmp_path / "scores.json"
    options = ["--packed", prepared_data.folder / "val", "--json", scores]
    interrupts = Interrupts(tool("evaluate", tmp_path / "export", *options), tmp_path, say)
    interrupts.undisturbed()
    for moment in interrupts.moments():
        scores.unlink(missing_ok=True)
        interrupts.at(moment, 130, 0)
        assert not scores.exists() or json.loads(scores.read_text())["scores"]
