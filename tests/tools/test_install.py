"""`pip install .` into an environment of its own, then `bov` from another folder; and the same commands in tools/."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from bov_megatron.commands import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("bov_megatron", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
SMALL = (
    "model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=2", "model.vocab_size=512",
    "model.sequence_length=64", "parallel.tensor_model_parallel_size=1", "train.micro_batch_size=2",
    "train.global_batch_size=2", "train.steps=3", "validation.tokens=128", "logging.wandb=disabled", "data.path=data",
    "output_dir=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def bov(tmp_path_factory):
    """`bov(*arguments)`: what the installed command prints, in a folder outside the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    environment, source, elsewhere = folder / "venv", folder / "source", folder / "elsewhere"
    for path in (source, elsewhere):
        path.mkdir()
    for name in PACKAGED:  # a copy: building leaves files in the folder
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(environment, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": environment}))
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")  # too large to install again
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, "install", *options, source], check=True, cwd=folder)
    shutil.rmtree(source)
    shutil.copy(ROOT / "recipes/smoke.yaml", elsewhere)
    variables = {name: value for name, value in os.environ.items() if name not in (*LAUNCHERS, "PYTHONPATH")}

    def call(*arguments: str | Path) -> str:
        done = subprocess.run(
            [environment / "bin/bov", *arguments], cwd=elsewhere, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call.folder = elsewhere
    return call


def test_from_text_to_an_evaluated_export(bov):
    text = Path(sysconfig.get_path("stdlib"), "json")
    bov("train-tokenizer", text, "--vocab-size", "512", "--out", "tokenizer", "--quiet")
    bov("prepare-data", text, "--tokenizer", "tokenizer", "--out", "data", "--sequence-length", "64",
        "--validation-fraction", "0.2", "--workers", "1", "--quiet")  # fmt: skip
    assert json.loads(bov("plan", "smoke.yaml", *SMALL, "--json"))["steps"] == 3
    bov("train", "smoke.yaml", *SMALL)
    assert "agree with the Megatron model's" in bov("convert", "to-hf", "run", "export")
    bov("evaluate", "export", "--packed", "data/val", "--limit", "4", "--offline", "--json", "scores.json")
    scores = json.loads((bov.folder / "scores.json").read_text())["scores"]
    assert 0 < scores["packed"]["bits_per_byte"] < 20


def test_the_page_of_a_study(bov):
    """The template and its style are in the wheel."""
    (bov.folder / "study.yaml").write_text(
        "base: smoke.yaml\nvariants: {baseline: {model.value.source: projection}, bank: {}}\nsizes: {d3: {depth: 3}}\n"
        "budgets: {tokens: [2e5]}\n"
    )
    bov("study", "report", "study.yaml", "output_dir=study", "--out", "page")
    assert "No run of bank has finished" in (bov.folder / "page/index.html").read_text()


def test_help_lists_every_command(bov):
    text = bov()
    assert text == bov("--help")
    for name, (_, line) in COMMANDS.items():
        assert name in text and line in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_command_is_a_file_of_tools_too(name, tmp_path):
    tool = ROOT / "tools" / f"{name.replace('-', '_')}.py"
    done = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: bov {name} ")


def test_errors_take_one_line(capsys):
    assert main(["plan", "no_recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no_recipe.yaml" in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        main(["plam"])
    assert end.value.code == 2 and "invalid choice: 'plam'" in capsys.readouterr().err
