"""Loss curves from metrics files."""

import json

import pytest

from bov_megatron.training.plot import plot_runs


def write_run(folder, losses, bits):
    folder.mkdir()
    lines = [{"step": i + 1, "tokens": 100 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    lines[-1]["validation_bits_per_byte"] = bits
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_both_runs_are_drawn(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "a", [3.0, None, 2.0], 1.5)  # a step whose loss was not finite
    second = write_run(tmp_path / "b", [4.0, 3.5, 3.0], 1.8)
    both = plot_runs({"a": first, "b": second}, tmp_path / "both.png", "title")
    image = matplotlib.image.imread(both)
    assert image.shape[0] > 400 and image.shape[1] > 1000
    alone = matplotlib.image.imread(plot_runs({"a": first}, tmp_path / "alone.png", "title"))
    assert (image != alone).any(), "the second run leaves no trace"


def test_a_run_without_metrics(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no metrics\.jsonl"):
        plot_runs({"a": tmp_path / "empty"}, tmp_path / "out.png", "title")
