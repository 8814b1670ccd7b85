"""Pictures of runs: nothing is lost between metrics.jsonl and the picture, and twenty long runs take seconds."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bov_megatron import errors
from bov_megatron.commands import main
from bov_megatron.plotting.curves import envelope, labels, read_runs
from bov_megatron.plotting.figure import COLOURS, FORMS, _apart, draw, style
from bov_megatron.plotting.metrics import BLOCK_BYTES, read_columns
from bov_megatron.plotting.page import page
from bov_megatron.plotting.watch import WatchedRun, sparkline

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["loss", "gradient_norm", "tokens", "validation_bits_per_byte", "learning_rate/matrix", "mfu"]


def step_line(step: int, loss: float | None = 3.0, **more) -> dict:
    line = {"step": step, "loss": loss, "gradient_norm": 1 / (step + 1), "updated": True, "digest": "0123456789ab"}
    line |= {"tokens": step * 4096, "learning_rate/matrix": 0.02, "step_seconds": 0.5, "tokens_per_second": 8192.5}
    return line | more


def write(folder: Path, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def mixed_lines(count: int) -> list[dict]:
    """Lines of every kind that a trainer writes, over several blocks."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, count + 1):
        more = {}
        if step % 250 == 0:
            more = {"validation_bits_per_byte": float(rng.random()), "samples": [{"prompt": "a, b", "text": '"c": 1}'}]}
        if step % 997 == 0:
            more |= {"skipped": "not finite", "sample_ids": [[0, 1], [0, 2]]}
        if step > count // 2:  # continued on a GPU
            more["mfu"] = 0.4
        lines.append(
            step_line(
                step, None if step % 997 == 0 else float(rng.normal(3, 1e-3) * 10.0 ** rng.integers(-20, 3)), **more
            )
        )
    return lines


def test_every_number_is_read_as_written(tmp_path):
    lines = mixed_lines(80_000)
    folder = write(tmp_path / "run", lines, tail='{"step": 80001, "lo')
    assert (folder / "metrics.jsonl").stat().st_size > 2 * BLOCK_BYTES
    columns = read_columns(folder, KEYS)
    for key in ("step", *KEYS):
        wanted = np.array([line.get(key) for line in lines], float)  # None becomes nan
        assert np.array_equal(columns.numbers[key], wanted, equal_nan=True), key
    assert columns.is_step.all()


def test_lines_written_by_another_program(tmp_path):
    lines = [step_line(step) for step in range(1, 40)]
    reordered = [dict(reversed(line.items())) for line in lines]
    (tmp_path / "run").mkdir()
    for name, text in (
        ("compact", [json.dumps(line, separators=(",", ":")) for line in lines]),
        ("changing", [json.dumps(line) for pair in zip(lines[::2], reordered[1::2], strict=False) for line in pair]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
        columns = read_columns(folder, KEYS)
        assert columns.numbers["step"].tolist() == list(range(1, len(text) + 1))
        assert columns.numbers["gradient_norm"][4] == 1 / 6


def test_what_was_done_again_counts_once(tmp_path):
    """A run that continued from step 3 without dropping the lines after it, and one that rolled back."""
    first = [step_line(step, 9.0, validation_bits_per_byte=5.0) for step in range(1, 7)]
    again = [step_line(step, 2.0) for step in range(4, 8)]
    late = {"step": 3, "tokens": 1, "validation_bits_per_byte": 4.0}
    columns = read_columns(write(tmp_path / "restarted", [*first, late, *again]), KEYS)
    assert columns.numbers["step"].tolist() == [1, 2, 3, 3, 4, 5, 6, 7]
    assert columns.numbers["loss"][[0, 2, 4, 7]].tolist() == [9, 9, 2, 2]
    assert columns.is_step.tolist() == [True, True, True, False, True, True, True, True]
    rollback = {"step": 4, "rollback": {"number": 1, "from_step": 6, "to_step": 4, "reason": "spike"}}
    (run,) = read_runs([write(tmp_path / "rolled_back", [*first, rollback])])
    assert run.columns.numbers["step"].tolist() == [1, 2, 3, 4, 4]
    assert len(run.rolled_back()) == 1


def test_a_spike_of_one_step_survives_the_thinning():
    x, values = np.arange(1, 100_001.0), np.full(100_000, 2.0)
    values[77_777] = 50.0
    values[123] = -1.0
    thin = envelope(x, values)
    assert len(thin.x) <= 500 and thin.high.max() == 50 and thin.low.min() == -1
    spike = thin.high.argmax()
    assert abs(thin.x[spike] - 77_778) < 200
    assert (np.diff(thin.x) > 0).all() and np.isclose(thin.mean.mean(), values.mean(), atol=1e-3)


def test_hours_and_flops(tmp_path):
    import yaml

    from bov_megatron.recipe import load_recipe
    from bov_megatron.recipe.quantities import flops_per_token

    recipe = load_recipe(ROOT / "recipes/smoke.yaml")
    folder = write(tmp_path / "run", [step_line(step) for step in range(10, 101, 10)])  # logging.interval=10
    with pytest.raises(Exception, match="recipe.yaml cannot be read, so FLOPs cannot be counted"):
        read_runs([folder], "flops")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_runs([folder], "hours")[0].x[-1] == pytest.approx(100 * 0.5 / 3600)
    assert read_runs([folder], "flops")[0].x[-1] == pytest.approx(100 * 4096 * flops_per_token(recipe.model))


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(1)
    runs = []
    for name, offset in (("bov", 0.0), ("baseline", 0.1), ("spiky", 0.2)):
        losses = 2 + offset + 5 / np.sqrt(np.arange(1, 1001)) + rng.normal(0, 0.02, 1000)
        if name == "spiky":
            losses[700] = 9.5
        lines = [step_line(i + 1, float(loss), mfu=0.4) for i, loss in enumerate(losses)]
        for line in lines[99::100]:
            line["validation_bits_per_byte"] = line["loss"] / 3
        runs.append(write(folder / name, lines))
    return runs


def test_a_picture_has_every_run_and_names_it(three_runs):
    figure = draw(read_runs(three_runs))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        *("Training loss", "Validation", "Gradient norm"),
        *("Learning rate of block matrices", "Throughput", "Model FLOPs utilisation"),
    ]
    for axis in figure.axes:
        assert {f"run-{number}" for number in range(3)} <= {artist.get_gid() for artist in axis.get_children()}
        assert axis.get_ylabel() and axis.get_xlabel() == "optimizer steps"
    loss = figure.axes[0]
    texts = [text.get_text() for text in loss.texts]
    assert [name for name in ("bov", "baseline", "spiky") if any(text.startswith(name) for text in texts)]
    assert "9.5" in texts, "the spike lies above the picture, and is marked with its value"
    assert loss.get_ylim()[1] < 4


def test_evaluations_are_drawn_wherever_they_were_made(tmp_path):
    """Those of training, and those that jobs left in the run folder, as one curve in the order of steps."""
    import yaml

    from bov_megatron.recipe import load_recipe

    code = "evaluation/bits_per_byte/code"
    changes = ["evaluation.held_out=[{name: code, path: x}, {name: unseen, path: y}]", "evaluation.core=z"]
    lines = [step_line(step, **({code: step / 10} if step in (2, 6) else {})) for step in range(1, 9)]
    folder = write(tmp_path / "run", lines)
    recipe = load_recipe(ROOT / "recipes/smoke.yaml", changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (folder / "evaluations").mkdir()
    for step in (4, 8):
        found = {"step": step, code: step / 10, "evaluation/core": 0.25}
        (folder / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(found))
    (run,) = read_runs([folder], "tokens")
    x, values = run.curve(code)
    assert values.tolist() == [0.2, 0.4, 0.6, 0.8] and x.tolist() == [4096 * step for step in (2, 4, 6, 8)]
    titles = [axis.get_title(loc="left") for axis in draw([run]).axes]
    assert [title for title in titles if title.startswith(("Held-out", "CORE"))] == ["Held-out code", "CORE"]


def test_twenty_runs_can_be_told_apart(three_runs):
    looks = {(style(number)["color"], str(style(number)["linestyle"])) for number in range(20)}
    assert len(looks) == 20 <= len(COLOURS) * len(FORMS)
    places = _apart(np.sort(np.random.default_rng(0).normal(0.5, 0.01, 20)), 0.048)
    assert (np.diff(places) > 0.0479).all() and places[0] >= 0 and places[-1] <= 1
    assert labels([Path("a/run/seed1"), Path("b/run/seed1")]) == ["a/run/seed1", "b/run/seed1"]


def test_a_page_stands_alone_and_shows_where_runs_stand(three_runs):
    text = page(read_runs(three_runs, "tokens"), "tokens")
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    for number, run in enumerate(three_runs):
        assert f'data-run="run-{number}"' in text and f'id="run-{number}"' in text and run.name in text
    assert "1,000" in text and "40.0%" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_the_command_writes_files(three_runs, tmp_path, suffix, capsys):
    out = tmp_path / "deep" / f"out{suffix}"
    assert main(["plot", *map(str, three_runs), "--out", str(out), "--x", "tokens"]) == 0
    assert out.stat().st_size > 20_000 and capsys.readouterr().out == f"{out}\n"


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_text('{"step": 1, "loss"')
    (tmp_path / "text").mkdir()
    (tmp_path / "text/metrics.jsonl").write_text("step,loss\n1,2\n")
    for name, part in (("empty", "give the folder of a run"), ("new", "no complete line yet"), ("text", "no line of")):
        assert main(["plot", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and part in error
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path), "--out", "picture.gif"])


def test_watching_reads_what_is_new(tmp_path):
    folder = write(tmp_path / "run", [step_line(1), step_line(2)], tail='{"step": 3,')
    run = WatchedRun(folder, "run")
    assert run.columns().numbers["step"].tolist() == [1, 2] and run.state() == "stopped"
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(step_line(3))[len('{"step": 3,') :] + "\n")
    assert run.columns().numbers["step"].tolist() == [1, 2, 3]
    part = folder / "metrics.part"  # a start that drops the lines after its checkpoint
    part.write_text(json.dumps(step_line(1)) + "\n" + json.dumps(step_line(2, 7.0)) + "\n")
    os.replace(part, path)
    assert run.columns().numbers["loss"].tolist() == [3.0, 7.0]
    assert WatchedRun(tmp_path / "later", "later").state() == "not started"


def test_a_spike_is_red(three_runs):
    line = sparkline(WatchedRun(three_runs[2], "spiky").columns(), 30)
    assert len(line.plain) == 30
    red = [span.start for span in line.spans if "red" in str(span.style)]
    assert 20 in red or 21 in red


def test_the_live_view_in_a_terminal(three_runs):
    """On a real pseudo-terminal, until Ctrl-C: no traceback."""
    main_end, terminal = pty.openpty()
    command = [sys.executable, ROOT / "tools/plot.py", *three_runs, "--watch"]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**os.environ, "COLUMNS": "150"})
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 60
    while shown.count(b"spiky") < 2 and time.monotonic() < deadline:
        shown += os.read(main_end, 65536)
    process.send_signal(2)
    assert process.wait(60) == errors.CTRL_C
    assert b"Traceback" not in shown and "▁".encode() in shown and b"8,19" in shown


def test_twenty_runs_of_a_hundred_thousand_steps(tmp_path):
    """Under five seconds on two free cores; what is bounded here is the processors' time, with a wide margin."""
    line = json.dumps(step_line(0, 2.25, mfu=0.4)).replace('"step": 0', '"step": %d').replace("2.25", "%.15f")
    losses = np.random.default_rng(0).normal(3, 0.1, 100_000)
    folder = tmp_path / "run00"
    folder.mkdir()
    text = "".join(line % (step, loss) + "\n" for step, loss in enumerate(losses, 1))
    (folder / "metrics.jsonl").write_text(text)
    for number in range(1, 20):
        (tmp_path / f"run{number:02}").mkdir()
        os.link(folder / "metrics.jsonl", tmp_path / f"run{number:02}" / "metrics.jsonl")
    before = os.times()
    command = [sys.executable, ROOT / "tools/plot.py", *sorted(tmp_path.glob("run*")), "--out", tmp_path / "out.png"]
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{len(text) / 1e6:.0f} MB a run, {seconds:.1f} processor seconds")
    assert seconds < 20
