"""Any recipe ends in a plan or in one RecipeError, whatever is in it."""

import dataclasses
import json
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bov_megatron.errors import RecipeError
from bov_megatron.plan import format_plan, plan
from bov_megatron.recipe import Recipe, load_recipe, recipe_from_dict
from bov_megatron.recipe.limits import OneOf, limits_of

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 100, 128, 256, 1000, 2048, 50257])
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        ["", "1e18", "inf", "nan", "-1", "1_000", "true", "{name}", "{", "../x", "a\nb", "\ud800", "S", "L"]
    ),
    st.dates(),
    st.binary(max_size=3),
    st.lists(st.integers(-1, 40), max_size=6),
    st.lists(st.none() | st.text(max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), st.integers() | st.none(), max_size=2),
)


def fields_of(section: type, where: str = "") -> dict[str, typing.Any]:
    """`section.field` -> annotation, of a recipe's dataclasses."""
    found = {}
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= fields_of(hint, f"{where}{name}.")
        else:
            found[f"{where}{name}"] = hint
    return found


FIELDS = fields_of(Recipe)


def fitting(hint: typing.Any) -> st.SearchStrategy:
    """Values of about the right type, so that the checks of several fields together are reached."""
    choices = [limit.known for limit in limits_of(hint) if isinstance(limit, OneOf)]
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if choices:
        return st.sampled_from(list(choices[0])) | st.lists(st.integers(0, 12), max_size=4)
    if typing.get_origin(plain) is typing.Literal:
        return st.sampled_from(typing.get_args(plain))
    if plain is bool:
        return st.booleans()
    if plain is float or float in typing.get_args(plain):
        return st.sampled_from([0.0, 1e-12, 0.5, 1.0, 3.7, 1e9, 1e21])
    return SIZES if plain is int or int in typing.get_args(plain) else ANYTHING


FIELD = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(fitting(FIELDS[name]), fitting(FIELDS[name]), ANYTHING))
)
WRONG_KEY = st.tuples(
    st.sampled_from(["modle", "model.hiden_size", "train.", "data.streams.path", "optimizer.name.x", "1", "base", "é"]),
    ANYTHING,
)
LAYOUT = st.fixed_dictionaries(
    {
        "model.num_layers": st.integers(1, 12),
        "model.num_attention_heads": st.sampled_from([1, 2, 4, 6, 8]),
        "model.hidden_size": st.sampled_from([24, 48, 96, 192]),
        "train.global_batch_size": st.sampled_from([1, 2, 6, 8, 16, 24]),
        "train.steps": st.integers(1, 10),
    },
    optional={name: fitting(hint) for name, hint in FIELDS.items() if name.startswith(("parallel.", "model.value."))}
    | {
        name: st.sampled_from([1, 2, 3, 4])
        for name in FIELDS
        if name.startswith("parallel.") and name.endswith("_parallel_size")
    }
    | {"parallel.pipeline_layers": st.lists(st.integers(0, 6), max_size=5)},
)


def nested(flat: dict[str, typing.Any]) -> dict:
    values: dict = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    return values


def planned_or_refused(make: typing.Callable[[], Recipe], world_size: int | None) -> bool:
    """Whether `plan` described the recipe; any other outcome than that or a RecipeError of one line fails."""
    try:
        recipe = make()
        result = plan(recipe, world_size)
    except RecipeError as error:
        assert str(error).strip()
        return False
    assert format_plan(result).startswith("Plan of ")
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    return True


@given(
    layout=LAYOUT, fields=st.lists(FIELD, max_size=3), world_size=st.sampled_from([None, 1, 2, 3, 4, 8, 12, 24, 0, -1])
)
@settings(SETTINGS, max_examples=1500)
def test_any_layout_is_planned_or_refused(layout, fields, world_size):
    planned_or_refused(lambda: recipe_from_dict(nested({**layout, **dict(fields)})), world_size)


@given(fields=st.lists(FIELD | WRONG_KEY, min_size=1, max_size=6))
@settings(SETTINGS, max_examples=400)
def test_any_values_are_planned_or_refused(fields):
    planned_or_refused(lambda: recipe_from_dict(nested({"train.steps": 3, **dict(fields)})), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def yaml_bytes(values) -> bytes:
    try:
        return yaml.safe_dump(values, allow_unicode=True).encode(errors="surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return repr(values).encode(errors="surrogatepass")


FILES = st.one_of(
    st.binary(max_size=60),
    st.text(alphabet="-:{}[]&*!|>'\"%@#,? \n\tabné01.", max_size=60).map(lambda text: text.encode()),
    st.lists(FIELD | WRONG_KEY, max_size=4).map(lambda fields: yaml_bytes(nested(dict(fields)))),
    st.sampled_from([b"&a [*a]", b"a: &a {b: *a}", b"train: &t {x: *t}", b"? [1]\n: 2", b"2001-13-45"]),
)
OVERRIDES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.tuples(st.sampled_from(sorted(FIELDS)), st.text(max_size=6)).map("=".join),
        FIELD.map(lambda field: f"{field[0]}={field[1]}"),
    ),
    max_size=3,
)


@given(content=FILES, overrides=OVERRIDES)
@settings(SETTINGS, max_examples=300)
def test_any_file_and_overrides_are_planned_or_refused(folder, content, overrides):
    (folder / "recipe.yaml").write_bytes(content)
    planned_or_refused(lambda: load_recipe(folder / "recipe.yaml", overrides), None)


@pytest.mark.parametrize(
    "field", ["model.num_layers", "train.global_batch_size", "train.micro_batch_size", "parallel.context_parallel_size"]
)
def test_a_size_that_no_run_has_is_refused_at_once(field):
    """Sizes are counted through in places; 2**62 would take for ever."""
    with pytest.raises(RecipeError, match=f"{field}={2**62}: must be at most"):
        recipe_from_dict(nested({"train.steps": 3, field: 2**62}))


def test_yaml_too_deep_to_read(folder):
    """Once only: PyYAML takes a second for it."""
    (folder / "recipe.yaml").write_bytes(b"[" * 1500)
    with pytest.raises(RecipeError, match="is not valid YAML: maximum recursion depth"):
        load_recipe(folder / "recipe.yaml")


def test_the_fuzz_reaches_both_outcomes():
    """Else the tests above could not fail."""
    found = []

    @given(layout=LAYOUT)
    @settings(SETTINGS, max_examples=300, database=None)
    def collect(layout):
        found.append(planned_or_refused(lambda: recipe_from_dict(nested(layout)), None))

    collect()
    assert 10 < sum(found) < len(found) - 10
