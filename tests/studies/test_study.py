"""A study file becomes the cells that it says, each the run that a person would start by hand, or one clear error."""

import dataclasses
import time
from pathlib import Path

import pytest
import yaml

from bov_megatron.errors import StudyError
from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.quantities import effective_rates, parameter_counts, total_steps
from bov_megatron.studies.study import load_study

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted((RECIPES / "studies").glob("*.yaml"))


def write(folder: Path, **changes) -> Path:
    """A small study in `folder`, with keys changed, or left out where None."""
    values = {
        "base": str(RECIPES / "135m_baseline.yaml"),
        "variants": {"baseline": {}, "bank": {"model.value.source": "bank"}},
        "sizes": {"d6": {"depth": 6}, "d12": {"depth": 12}},
        "budgets": {"flops": [1e17, "1e18"]},
    }
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def cell(study, name):
    return {cell.name: cell for cell in study.cells}[name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_cells_are_runs_that_a_person_would_start(path):
    study = load_study(path, ["data.path=data/other"])
    assert study.baseline in {cell.variant for cell in study.cells} and study.description
    for one in {(cell.variant, cell.size): cell for cell in study.cells}.values():
        by_hand = load_recipe(one.base, one.overrides)
        assert by_hand == one.recipe
        assert (
            by_hand.run_dir
            == study.output_dir / "cells" / one.name
            == Path("runs/studies") / path.stem / by_hand.run_dir.relative_to(study.output_dir)
        )
        assert (by_hand.train.seed, by_hand.data.shuffle_seed) == (one.seed, one.seed)
        assert by_hand.data.path == "data/other"


def test_all_combinations_in_the_order_of_the_file(tmp_path):
    study = load_study(write(tmp_path, seeds=[3, 1]))
    names = [cell.name.removeprefix("baseline-") for cell in study.cells]
    assert names[:5] == ["d6-1e17-s3", "d6-1e17-s1", "d6-1e18-s3", "d6-1e18-s1", "d12-1e17-s3"]
    assert len(study.cells) == 16 and study.baseline == "baseline" and study.name == "mine"


@pytest.mark.parametrize(("depth", "recipe"), [(12, "135m_baseline"), (24, "780m_baseline")])
def test_the_dial_gives_the_papers_models(tmp_path, depth, recipe):
    study = load_study(write(tmp_path, sizes={"size": {"depth": depth}}))
    ours, paper = cell(study, "baseline-size-1e18-s0").recipe, load_recipe(RECIPES / f"{recipe}.yaml")
    assert (ours.model, ours.batch_tokens) == (paper.model, paper.batch_tokens)
    assert effective_rates(ours) == effective_rates(paper)


def test_ablations_are_those_of_the_variants_folder():
    study = load_study(RECIPES / "studies/ablations_135m.yaml")
    names = {path.stem: path for path in (RECIPES / "variants").glob("*.yaml")}
    compared = [cell for cell in study.cells if cell.variant in names]
    assert len(compared) > 12
    for one in compared:
        theirs = load_recipe(names[one.variant])
        assert (one.recipe.model, one.recipe.optimizer) == (theirs.model, theirs.optimizer), one.variant


def test_what_is_set_last_holds(tmp_path):
    path = write(
        tmp_path,
        overrides={"optimizer.table_lr": 0.1, "optimizer.matrix_lr": 0.01, "train.global_batch_size": 64},
        sizes={"d6": {"depth": 6, "optimizer.table_lr": 0.2, "optimizer.smear_lr": 0.1}, "d12": {"depth": 12}},
        variants={"baseline": {}, "bank": {"model.value.source": "bank", "optimizer.table_lr": 0.3}},
    )
    study = load_study(path, ["optimizer.smear_lr=0.4"])
    rates = {
        (one.variant, one.size): (one.recipe.optimizer.table_lr, one.recipe.optimizer.smear_lr) for one in study.cells
    }
    assert rates == {
        ("baseline", "d6"): (0.2, 0.4), ("baseline", "d12"): (0.1, 0.4),
        ("bank", "d6"): (0.3, 0.4), ("bank", "d12"): (0.3, 0.4),
    }  # fmt: skip
    assert {one.recipe.train.global_batch_size for one in study.cells} == {64}, "set, so not the dial's"
    assert {one.recipe.optimizer.matrix_lr for one in study.cells} == {0.01}


def test_budgets_in_tokens(tmp_path):
    study = load_study(write(tmp_path, budgets={"tokens": [1e9]}))
    for one in study.cells:
        assert one.budget == "1e9tokens"
        tokens = total_steps(one.recipe) * one.recipe.batch_tokens
        assert abs(tokens - 1e9) <= one.recipe.batch_tokens / 2


def test_the_batch_is_the_sizes_whatever_the_variant(tmp_path):
    # Wide enough for the rule's next power of two, had it been asked about the variant.
    study = load_study(write(tmp_path, variants={"baseline": {}, "wide": {"model.ffn_hidden_size": 32768}}))
    for size in ("d6", "d12"):
        assert len({one.recipe.batch_tokens for one in study.cells if one.size == size}) == 1


def test_controls_control():
    cells = {(one.variant, one.size): one.recipe for one in load_study(RECIPES / "studies/controls.yaml").cells}
    for size in ("d12", "d18"):
        bank, base = cells["bank", size], cells["baseline", size]
        more, wider = cells["baseline_more_parameters", size], cells["baseline_wider", size]
        total = {name: sum(parameter_counts(r.model).values()) for name, r in (("bank", bank), ("more", more))}
        step = 2 * 128 * more.model.num_layers * more.model.hidden_size
        assert abs(total["bank"] - total["more"]) <= step / 2 and total["bank"] > 1.5 * 1e8
        assert more.model.value.source == "projection"
        steps = {name: total_steps(cells[name, size]) for name in ("baseline_more_tokens", "bank_fewer_tokens")}
        assert steps == {"baseline_more_tokens": total_steps(bank), "bank_fewer_tokens": total_steps(base)}
        assert total_steps(bank) > total_steps(base)
        assert wider.model.hidden_size > base.model.hidden_size and wider.model.num_layers == base.model.num_layers


def test_ranks_of_a_cell(tmp_path):
    tensor = {"parallel.tensor_model_parallel_size": 2}
    study = load_study(write(tmp_path, sizes={"d6": {"depth": 6, "world_size": 8}, "d12": {"depth": 12, **tensor}}))
    assert {(one.size, one.world_size) for one in study.cells} == {("d6", 8), ("d12", 2)}


def test_another_folder_for_the_runs(tmp_path):
    study = load_study(write(tmp_path), [f"output_dir={tmp_path}/elsewhere/{{name}}"])
    assert study.output_dir == tmp_path / "elsewhere/mine"
    assert study.cells[0].run_dir == tmp_path / "elsewhere/mine/cells/baseline-d6-1e17-s0"


def test_thousands_of_cells_load_in_seconds(tmp_path):
    sizes = {f"d{depth}": {"depth": depth} for depth in (4, 6, 8, 10, 12)}
    path = write(tmp_path, sizes=sizes, budgets={"flops": [i * 1e18 for i in range(1, 11)]}, seeds=list(range(20)))
    started = time.process_time()
    assert len(load_study(path).cells) == 2000
    assert time.process_time() - started < 5


WRONG = [
    ({"varaints": {}}, "unknown key 'varaints'; did you mean 'variants'?"),
    ({"sizes": {"d6": {"dept": 6}}}, "unknown key 'sizes.d6.dept'; did you mean 'depth'?"),
    ({"sizes": {"d6": {"depth": "deep"}}}, "sizes.d6.depth='deep': expected an integer"),
    ({"sizes": {"d6": {"depth": 6, "recipe": "x.yaml"}}}, "sizes.d6: depth and recipe are both given"),
    ({"sizes": {"d6": {"recipe": "135m.yaml"}}}, "135m.yaml does not exist"),
    ({"sizes": {"d6": {"depth": 0}}}, "sizes.d6.depth=0: must be at least 1"),
    ({"sizes": {12: {"depth": 12}}}, "the name 12 is not letters"),
    ({"sizes": None}, "'sizes' is missing; e.g. sizes: {d12: {depth: 12}}"),
    ({"variants": {"baseline": {}, "bank": {"model.value.sorce": "bank"}}}, "did you mean 'model.value.source'?"),
    ({"variants": {"baseline": {}, "bank": {"model.value": {"source": "bank"}}}}, "e.g. model.value.source"),
    ({"variants": {"baseline": {}, "more": {"match_parameters": "bnak"}}},
     "variants.more.match_parameters: 'bnak' is unknown"),
    ({"variants": {"small": {"model.ffn_hidden_size": 8}, "big": {"match_parameters": "small", "model.head_dim": 512}}},
     "variants.big.match_parameters: small has "),
    ({"baseline": "bnak"}, "baseline: 'bnak' is unknown; did you mean 'bank'?"),
    ({"cells": [{"variants": ["bnak"]}]}, "cells: variants: 'bnak' is unknown; did you mean 'bank'?"),
    ({"cells": [{"budgets": ["2e17"]}]}, "cells: budgets: '2e17' is unknown"),
    ({"cells": [{"sizes": ["d6"]}]}, "sizes: 'd12' is in no cell"),
    ({"cells": [{}, {"sizes": ["d6"]}]}, "cell baseline-d6-1e17-s0 is in 'cells' twice"),
    ({"variants": {"a": {}, "b": {"model.value.source": "projection"}}},
     "cells a-d6-1e17-s0 and b-d6-1e17-s0 are the same run"),
    ({"variants": {"baseline": {}, "odd": {"model.num_query_groups": 5}}},
     "cell odd-d6-1e17-s0 can't be built: model.num_attention_heads=3 is not divisible by model.num_query_groups=5"),
    ({"sizes": {"d6": {"depth": 6, "world_size": 3}}},
     "cell baseline-d6-1e17-s0 can't be built: train.global_batch_size="),
    ({"budgets": {"flops": [1e3]}},
     "cell baseline-d6-1e3-s0 can't be built: train.budget_flops=1e+03 does not pay for one step"),
    ({"budgets": {"flops": [1e18, "1e18"]}}, "budgets: 1e18 is listed twice"),
    ({"budgets": {"tokens": [1e5]}},
     "cell baseline-d6-1e5tokens-s0 can't be built: 100000 tokens are less than half a batch"),
    ({"budgets": {"flops": []}}, "budgets: there is none"),
    ({"cells": [{"sizes": []}]}, "cells[0].sizes is empty and so selects nothing"),
    ({"cells": [{"seeds": [-1]}]}, "seeds=[-1]: must be different integers"),
    ({"budgets": {"tokens": [-1]}}, "must be greater than 0"),
    ({"budgets": {"steps": [1]}}, "unknown field 'budgets.steps'"),
    ({"seeds": [1, 1]}, "seeds=[1, 1]: must be different integers"),
    ({"overrides": {"train.seed": 4}}, "overrides: train.seed is set by the study in every cell; use the study's "),
    ({"base": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ({"output_dir": "runs/{size}"}, "only {name}, the study's name, may be in braces"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_what_is_wrong_is_said_in_one_line(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(StudyError) as error:
        load_study(path)
    text = str(error.value)
    assert message in text and text.startswith(f"study {path}: ") and "\n" not in text


def test_wrong_files_and_overrides(tmp_path):
    path = write(tmp_path)
    with pytest.raises(StudyError, match="does not exist; did you mean mine.yaml?"):
        load_study(tmp_path / "mime.yaml")
    for override, message in (
        ("train.steps=5", "command line: train.steps is set by the study in every cell; use the study's budgets"),
        ("model.hiden_size=64", "did you mean 'model.hidden_size'"),
        ("model.hidden_size", "not of the form section.field=value"),
    ):
        with pytest.raises(StudyError, match=message):
            load_study(path, [override])
    path.write_text(path.read_text() + "sizes: {}\n")
    with pytest.raises(StudyError, match="'sizes' is given twice"):
        load_study(path)


def test_the_page_shows_a_study_and_lists_all_that_ship(tmp_path):
    page = (RECIPES.parent / "docs/use/studies.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0].replace("../", f"{RECIPES}/")
    (tmp_path / "example.yaml").write_text(example)
    names = [cell.name for cell in load_study(tmp_path / "example.yaml").cells]
    assert len(names) == 10 and "bank-d12-1.5e18-s0" in names and "bank-780m-3.91e19-s0" in names
    assert [f"| `{path.stem}` |" in page for path in SHIPPED] == [True] * len(SHIPPED)


def test_a_wider_variant_needs_a_depth(tmp_path):
    sizes = {"paper": {"recipe": str(RECIPES / "780m_baseline.yaml")}}
    path = write(tmp_path, sizes=sizes, variants={"baseline": {}, "wider": {"aspect_ratio": 80}})
    with pytest.raises(StudyError, match="variants.wider.aspect_ratio needs a depth, which size paper does not have"):
        load_study(path)


def test_cells_do_not_share_what_differs(tmp_path):
    first, second = (one.recipe for one in load_study(write(tmp_path, seeds=[0, 1])).cells[:2])
    assert dataclasses.replace(first, name="", train=second.train, data=second.data) == dataclasses.replace(
        second, name=""
    )
    assert first.train.seed != second.train.seed
