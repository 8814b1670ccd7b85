"""What a study costs: the paper's numbers, layouts that fit, hours and money, in seconds and without torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bov_megatron.errors import StudyError
from bov_megatron.plan import plan
from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.gpus import GPUS, peak_of_device
from bov_megatron.studies.layouts import smallest_layout, usable_bytes
from bov_megatron.studies.planning import format_study_plan, plan_study
from bov_megatron.studies.study import load_study

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "recipes/studies"
GPU_HOUR = 989e12 * 0.4 * 3600
"""FLOPs of an H100 in an hour at 40% of its peak."""

# arXiv 2606.02780, Table 6 and its reference implementation: cell -> parameters without tables, FLOPs/token, steps,
# tokens and FLOPs as printed.
PUBLISHED = {
    "baseline-135m-1.5e18-s0": (135_266_329, "7.596933e+08", "3,766", "1.974e+09", "1.500e+18"),
    "bank-135m-1.5e18-s0": (135_266_333 - 4 * 768**2, "7.455375e+08", "3,838", "2.012e+09", "1.500e+18"),
    "baseline-780m-3.91e19-s0": (780_140_569, "4.775215e+09", "7,809", "8.188e+09", "3.910e+19"),
    "bank-780m-3.91e19-s0": (780_140_577 - 8 * 1536**2, "4.661969e+09", "7,998", "8.387e+09", "3.910e+19"),
}


@pytest.fixture(scope="module")
def comparison():
    return plan_study(load_study(STUDIES / "comparison_780m.yaml"), price=2.5)


@pytest.fixture(scope="module")
def ladder():
    return plan_study(load_study(STUDIES / "ladder.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(comparison, name):
    cell = {cell.cell: cell for cell in comparison.cells}[name]
    found = (f"{cell.flops_per_token:.6e}", f"{cell.steps:,}", f"{cell.tokens:.3e}", f"{cell.flops:.3e}")
    assert (cell.parameters["without_tables"], *found) == PUBLISHED[name]
    row = next(line for line in format_study_plan(comparison).splitlines() if line.startswith(name))
    assert row.split()[1:4] == list(PUBLISHED[name][2:])
    assert f"{cell.parameters['all']:,}" in format_study_plan(comparison)


def test_conventions_of_counting(comparison):
    bank = {cell.cell: cell for cell in comparison.cells}["bank-135m-1.5e18-s0"].parameters
    embedding = head = 32768 * 768
    tables = 4 * embedding
    matrices = 12 * 12 * 768**2 - 4 * 768**2
    small = 4 + 25  # gamma of four layers; smear
    assert bank == {
        "all": matrices + embedding + head + tables + small,
        "without_embeddings": matrices + head + tables + small,
        "without_tables": matrices + embedding + head + small,
        "matrices": matrices,
        "matrices_and_head": matrices + head,
    }


def test_hours_and_cost_add_up(comparison):
    assert comparison.gpu_hours == pytest.approx((2 * 1.5e18 + 6 * 3.91e19) / GPU_HOUR, rel=1e-3)
    assert comparison.cost == pytest.approx(2.5 * comparison.gpu_hours) == sum(cell.cost for cell in comparison.cells)
    for cell in comparison.cells:
        assert cell.hours == pytest.approx(cell.gpu_hours / (8 if cell.size == "135m" else 16))
    assert f"{comparison.cost:,.2f} at 2.5 per GPU-hour" in format_study_plan(comparison)
    free = plan_study(load_study(STUDIES / "comparison_780m.yaml"), "B200", mfu=0.2)
    assert free.cost is None and free.cells[0].cost is None
    assert free.gpu_hours == pytest.approx(comparison.gpu_hours * 0.4 / 0.2 * 989 / 2250)


def test_memory_is_that_of_plan(comparison):
    cells = {cell.name: cell for cell in load_study(STUDIES / "comparison_780m.yaml").cells}
    for cell in comparison.cells:
        alone = plan(cells[cell.cell].recipe, cells[cell.cell].world_size)
        assert cell.layout.memory_per_rank_bytes == alone.memory_per_rank_bytes
        assert (cell.steps, cell.tokens, cell.flops) == (alone.steps, alone.tokens, alone.flops_total)


def test_the_ladder_fits_80_gb(ladder):
    assert all(cell.fits for cell in ladder.cells)
    assert 12.9e9 < max(cell.parameters["matrices_and_head"] for cell in ladder.cells) < 13.1e9
    for cell in ladder.cells:
        assert 18 < cell.tokens / cell.parameters["matrices_and_head"] < 21


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_fit(path):
    assert all(cell.fits and cell.steps > 25 for cell in plan_study(load_study(path)).cells)


def test_suggestions_are_recipes_that_fit(ladder):
    """What a plan suggests for smaller GPUs can be given to the recipe, and then needs what was said."""
    gpu = GPUS["A100-40GB"]
    small = plan_study(load_study(STUDIES / "ladder.yaml"), gpu.name)
    recipes = {cell.name: cell for cell in load_study(STUDIES / "ladder.yaml").cells}
    misfits = [cell for cell in small.cells if not cell.fits]
    assert misfits and len(misfits) < len(small.cells)
    for cell in misfits:
        one, suggested = recipes[cell.cell], cell.suggested
        keys = {override.partition("=")[0] for override in suggested.overrides}
        kept = [override for override in one.overrides if override.partition("=")[0] not in keys]
        alone = plan(load_recipe(one.base, [*kept, *suggested.overrides]), suggested.world_size)
        assert alone.memory_per_rank_bytes == suggested.memory_per_rank_bytes <= usable_bytes(gpu)
        assert f"{cell.variant} {cell.size} needs" in format_study_plan(small)
        assert cell.hours == pytest.approx(cell.gpu_hours / suggested.world_size)


def test_the_smallest_layout():
    def smallest(depth, world_size=1, *more):
        heads = [
            f"model.num_layers={depth}",
            f"model.hidden_size={64 * depth}",
            f"model.num_attention_heads={depth // 2}",
        ]
        recipe = load_recipe(ROOT / "recipes/135m_bov.yaml", [*heads, "train.steps=1", *more])
        return smallest_layout(recipe, world_size, GPUS["H100"])

    assert smallest(12).overrides == (), "nothing to change"
    assert smallest(28).overrides == ("train.micro_batch_size=8",), "a smaller micro-batch before more ranks"
    large = smallest(64)
    assert large.tensor_model_parallel_size == large.world_size == 4
    assert "parallel.sequence_parallel=true" in large.overrides
    assert smallest(64, 6).world_size == 8, "whole copies of the model"
    larger = smallest(96)
    assert (larger.tensor_model_parallel_size, larger.pipeline_model_parallel_size) == (8, 2), "a node, then a pipeline"
    # No pipeline for a source that reads the first layer: recomputation, last of all.
    assert smallest(96, 1, "model.value.source=first_layer").recompute == "full"


def test_what_fits_nowhere_is_said(tmp_path):
    path = tmp_path / "huge.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": str(ROOT / "recipes/135m_bov.yaml"),
                "variants": {"bank": {}},
                "sizes": {"wide": {"depth": 96, "aspect_ratio": 256}},
                "budgets": {"flops": [1e24]},
            }
        )
    )
    text = format_study_plan(plan_study(load_study(path)))
    assert "bank wide needs" in text and "Nor does it in any layout up to 64 ranks a model" in text


def test_measured_mfu(tmp_path):
    study = load_study(STUDIES / "smoke.yaml")
    lines = [{"step": step, "loss": 3.0, "mfu": mfu} for step, mfu in ((1, 0.1), (2, 0.3), (3, 0.32))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"rollback": {}}]))
    measured = plan_study(study, mfu=str(tmp_path))
    assert measured.mfu == 0.3 and "median" in format_study_plan(measured)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    for given, message in (
        (str(tmp_path), "no line of metrics.jsonl has an MFU"),
        (str(tmp_path / "no"), "neither a number"),
        (40, "must be between 0 and 1"),
    ):
        with pytest.raises(StudyError, match=message):
            plan_study(study, mfu=given)


def test_unknown_gpu_and_price():
    study = load_study(STUDIES / "smoke.yaml")
    with pytest.raises(StudyError, match="--gpu H10: unknown GPU; did you mean 'H100'?"):
        plan_study(study, "H10")
    with pytest.raises(StudyError, match="--price -1: must be 0 or more"):
        plan_study(study, price=-1)


def test_gpus_of_drivers_names():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GB200": 2500e12, "cpu": None}
    assert {name: peak_of_device(name) for name in names} == names


def test_command_is_fast_without_torch(tmp_path):
    arguments = ["plan", str(STUDIES / "ladder.yaml"), "--gpu", "H200", "--json", str(tmp_path / "plan.json")]
    code = (
        "import sys; from bov_megatron.commands.study import main; "
        f"status = main({arguments!r}); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    # Of processor time, which other work on this machine does not stretch.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
    assert result.returncode == 0 and "GPU-hours of H200" in result.stdout, result.stderr
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["gpu"]["name"] == "H200" and len(values["cells"]) == 14
    assert values["cells"][0].keys() >= {
        "cell",
        "parameters",
        "flops",
        "steps",
        "tokens",
        "layout",
        "suggested",
        "gpu_hours",
    }


def test_command_explains_bad_input():
    command = [sys.executable, str(ROOT / "tools/study.py"), "plan", str(STUDIES / "smoke.yaml"), "model.hiden_size=8"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "did you mean 'model.hidden_size'" in result.stderr
    assert result.stderr.startswith("error: study ") and result.stderr.count("\n") == 1
