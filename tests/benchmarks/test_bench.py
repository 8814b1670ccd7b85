"""The bench command runs from end to end, and what it compares really differs, or really agrees. Never a time."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.coverage import SCENARIOS, count_coverage
from benchmarks.generate_plot import saved_share
from benchmarks.timing import Spread, Timings, speed_ratio, take_turns

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    files = ["--json", str(path), "--picture", str(path.with_suffix(".png"))]
    done = subprocess.run(
        [sys.executable, "tools/bench.py", "--quick", "--threads", "1", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "QUICK" in done.stdout and "bank / projection" in done.stdout
    return json.loads(path.read_text())


def check_spread(spread):
    assert 0 < spread["minimum"] <= spread["median"] <= spread["maximum"]


def test_step_trains_two_different_models_with_two_different_optimizers(results):
    losses = {
        (o, s): results["step"][o]["variants"][s]["losses"] for o in ("muon", "adamw") for s in ("bank", "projection")
    }
    assert len({tuple(series) for series in losses.values()}) == 4
    for optimizer in ("muon", "adamw"):
        # Both sources start from the same embedding and output matrices, and from zero attention outputs.
        assert losses[optimizer, "bank"][0] == pytest.approx(losses[optimizer, "projection"][0], rel=1e-6)
        check_spread(results["step"][optimizer]["bank / projection"]["wall"])
        check_spread(results["step"][optimizer]["variants"]["bank"]["tokens_per_second"])
    assert losses["muon", "bank"][0] == losses["adamw", "bank"][0]


def test_both_losses_agree_and_ours_takes_less_memory(results):
    ours, megatrons = (results["loss"]["variants"][name] for name in ("ours", "megatron"))
    assert ours["losses"] == pytest.approx(megatrons["losses"], rel=1e-6)
    assert megatrons["peak_bytes"] > 3 * ours["peak_bytes"] > 0
    check_spread(results["loss"]["ours / megatron"]["wall"])


@pytest.mark.parametrize("source", ["bank", "projection"])
def test_both_attentions_compute_the_same(results, source):
    variants = results["attention"][source]["variants"]
    ours, megatrons = variants["auto"], variants["megatron"]
    assert ours["losses"] == pytest.approx(megatrons["losses"], rel=1e-2)
    # Of the first step: after that Muon, in bf16, turns rounding into visible change.
    assert ours["gradient_norms"][0] == pytest.approx(megatrons["gradient_norms"][0], rel=1e-5)
    assert ours["gradient_norms"] != megatrons["gradient_norms"], "bit for bit the same: one kernel against itself?"
    check_spread(results["attention"][source]["auto / megatron"]["wall"])


def test_lookup_variants_agree_and_differ_in_traffic(results):
    variants = results["lookup"]["variants"]
    assert set(variants) == {"reduce_scatter", "distinct", "head"}
    for key in ("value_norm", "gradient_norm"):
        assert all(v[key] == pytest.approx(variants["head"][key], rel=1e-6) and v[key] > 0 for v in variants.values())
    sizes = {name: v["bytes_per_rank"] for name, v in variants.items()}
    # 512 tokens of 64 fp32 channels are 128 KiB; half of that leaves a rank of two, forward and again backward.
    assert sizes["reduce_scatter"] == 128 * 1024
    assert sizes["head"] == 0
    assert 0 < sizes["distinct"] < sizes["reduce_scatter"] / 2
    steps = results["lookup"]["training_step"]
    plain, ahead = (steps["variants"][lookup]["losses"] for lookup in ("reduce_scatter", "distinct"))
    assert plain[0] == pytest.approx(ahead[0], rel=1e-6) and plain[0] != plain[-1]
    check_spread(steps["distinct / reduce_scatter"]["wall"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_traffic_is_what_the_ids_say(results, ranks):
    """The calculation for more ranks than can be started here gives what was counted on those that were."""
    for size, counted in results["lookup"]["traffic"][f"{ranks}_ranks"].items():
        plain = int(size.split("_")[0]) * counted["kv_dim"] * 2 * (ranks - 1) // ranks
        found = {lookup: (sent["forward"], sent["backward"]) for lookup, sent in counted["bytes"].items()}
        assert found["reduce_scatter"] == (plain, plain)
        distinct = plain * counted["distinct_share"] / ranks
        assert found["distinct"] == pytest.approx((distinct, distinct), rel=1e-6)


def test_loader_reports_its_share_of_a_step(results):
    for mode in ("in_process", "read_ahead"):
        check_spread(results["loader"][mode]["tokens_per_second"])
        assert results["loader"][mode]["share_of_step"] > 0


def test_checkpoint_stalls_are_reported(results):
    found = results["checkpoint"]
    check_spread(found["beside / waiting"])
    assert found["checkpoint_bytes"] > 1_000_000
    for way in ("waiting", "beside"):
        check_spread(found["variants"][way]["stall_seconds"])


def test_generation_counts_the_memory_of_values(results):
    """Three layers of width 64 in fp32, two sequences, vocabulary 512; the bank is in the last layer."""
    found = results["generate"]
    variants, in_file = found["variants"], found["variants"]["bank, tables in their file"]
    row = 64 * 4
    assert variants["projection"]["cache_bytes_per_token"] == 6 * row + 4
    assert variants["bank"]["cache_bytes_per_token"] == in_file["cache_bytes_per_token"] == 5 * row + 4
    assert variants["bank"]["table_bytes_on_the_device"] == in_file["table_bytes_in_the_file"] == 512 * row
    assert variants["projection"]["table_bytes_on_the_device"] == in_file["table_bytes_on_the_device"] == 0
    assert variants["bank"]["row_bytes_on_the_device"] == 0
    tokens = found["sequences"] * (found["prompt_tokens"] + found["new_tokens"])
    assert 0 < in_file["row_bytes_on_the_device"] <= tokens * (row + 4)
    assert found["bank_saves_memory_from_tokens"] == {"measured": 256, "V / B": 256}
    sizes = [
        (bank, found["bytes_by_context"]["projection"][length])
        for length, bank in found["bytes_by_context"]["bank"].items()
    ]
    assert [bank > projection for bank, projection in sizes] == [True, True, False, False]
    assert variants["bank"]["continuations"] == in_file["continuations"] != variants["projection"]["continuations"]
    check_spread(found["decode: bank / projection"]["wall"])
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")


def test_core_is_timed_on_a_model_and_on_an_engine(results):
    (found,) = results["core"].values()
    for kind in found.values():
        check_spread(kind["batches_over_one_by_one"]["wall"])
        check_spread(kind["engine, batches"]["examples_per_second"])
        check_spread(kind["the_same_of_the_engine"]["wall"])


def test_saved_share_is_zero_at_the_vocabulary_and_tends_to_a_third():
    assert saved_share(32_768, 32_768) == 0 and saved_share(4_096, 32_768, sequences=8) == 0
    assert saved_share(2**20, 32_768) == pytest.approx(0.3229, abs=1e-4)


def test_the_time_of_a_picture_is_reported(results):
    assert results["plot"]["runs"] == 20
    check_spread(results["plot"]["seconds"])


def test_a_study_is_read(results):
    found = results["studies"]
    assert (found["cells"], found["lines_of_metrics"]) == (200, 40_000)
    for what in ("load", "status", "results_first", "results_again"):
        check_spread(found[f"{what}_seconds"])


def test_another_seed_draws_other_studies(results, capsys):
    from tools.bench import main

    assert main(["coverage", "--quick", "--threads", "1", "--seed", "5"]) == 0
    assert "seed                            5" in capsys.readouterr().out
    assert results["coverage"]["seed"] == 0
    one, other = (count_coverage(SCENARIOS["runs 3e-4"], 4, 50, seed) for seed in (0, 5))
    assert {name: count / 4 for name, count in one.items()} == results["coverage"]["coverage"]["runs 3e-4"]
    assert one != other


def test_the_machine_is_described(results):
    assert results["machine"]["threads"] == 1 and results["quick"] and results["turns"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["lokup"],
            "unknown benchmark 'lokup'; known: step, attention, loss, loader, lookup, checkpoint, core, generate, plot",
        ),
        (["--turns", "0"], "--turns 0: must be at least 1"),
        (["recipes"], "needs a GPU"),
        (["step", "--against", "nowhere"], "--against nowhere: git knows no such commit"),
        (["loader", "--against", "HEAD"], "compares the benchmark 'step'; name it, and no other"),
        (["step", "loss", "--set", "train.compile=true"], "is for the benchmark 'step'; name it, and no other"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    import torch

    from tools.bench import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_commit_is_compared_by_its_own_code():
    from benchmarks.against import bench_against

    found = bench_against("HEAD", 1, quick=True, settings=["train.seed=5"])
    for source in ("bank", "projection"):
        now, head = (found[source]["variants"][tree] for tree in ("now", "HEAD"))
        assert len(now["losses"]) == len(head["losses"]) == 4
        assert now["losses"][0] != head["losses"][0], "the field is set for this tree alone"
        assert now["losses"][0] == pytest.approx(head["losses"][0], rel=0.1)
        assert now["update_milliseconds"].median > 0


def test_turns_alternate_and_discarded_ones_do_not_count():
    calls = []
    timings = take_turns({"a": lambda turn: calls.append(f"a{turn}"), "b": lambda turn: calls.append(f"b{turn}")}, 2, 1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert len(timings["a"].wall) == len(timings["b"].processor) == 2


def test_ratio_is_of_speeds_turn_by_turn():
    timings = {"fast": Timings([1.0, 2.0, 1.0], [1.0] * 3), "slow": Timings([2.0, 8.0, 3.0], [2.0] * 3)}
    ratio = speed_ratio(timings, "fast", "slow")["wall"]
    assert (ratio.median, ratio.minimum, ratio.maximum, ratio.low) == (3.0, 2.0, 4.0, None)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    """Of samples from a skewed distribution, whose median is ln 2."""
    draws = np.random.default_rng(0).exponential(size=(600, 15))
    spreads = [Spread.of(list(sample)) for sample in draws]
    held = np.mean([spread.low <= math.log(2) <= spread.high for spread in spreads])
    assert 0.94 < held < 0.99  # few order statistics, so more than 95%
