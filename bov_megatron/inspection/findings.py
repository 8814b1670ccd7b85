"""What the page says, from a run folder: curves, tables, neighbours, losses by frequency. Nothing is drawn here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bov_megatron import checkpoint
from bov_megatron.checkpoint import compatibility
from bov_megatron.data.shards import DataSet, streams_of
from bov_megatron.data.tokenizer import Encoder
from bov_megatron.errors import DataError, EvaluationError, RunFolderError
from bov_megatron.evaluation.target import Target, find_target
from bov_megatron.inspection import forward
from bov_megatron.inspection.forward import Behaviour
from bov_megatron.inspection.frequencies import Frequencies, count_tokens, open_data
from bov_megatron.inspection.pieces import StoredTensors, table_keys
from bov_megatron.inspection.tables import Neighbour, TableRows, embedding_key, nearest_rows, read_tables
from bov_megatron.lifecycle import run_folder
from bov_megatron.plotting.metrics import read_columns
from bov_megatron.recipe import Recipe, recipe_from_dict

COEFFICIENTS = {"gamma": "γ of the source's values", "projection_coefficient": "a of the layer's own values"}
"""Key of the metrics -> words."""
NEIGHBOURS, ASKED = 6, 12
"""Nearest rows shown of a token; tokens shown unless they are named."""
LONGEST_TEXT = 24
LEAST_TARGETS = 20
"""A bin with fewer targets has no mean worth showing."""


@dataclass(frozen=True)
class Options:
    step: int | None = None
    count_tokens: int = 4_000_000
    samples: int = 32
    """Held-out samples that the models run over; 0 builds no model."""
    batch_size: int = 4
    tokens: Sequence[str] = ()
    """Whose neighbours to show; none: chosen by frequency."""
    data: Path | None = None
    """Where the data are now, instead of the recipe's `data.path`."""
    device: str | None = None


@dataclass(frozen=True)
class Curve:
    kind: str
    layer: int
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Inspected:
    """A run at one checkpoint."""

    name: str
    target: Target
    step: int
    recipe: Recipe
    behaviour: Behaviour | None = None
    """None where no model was built."""

    @property
    def source_layers(self) -> list[int]:
        """Layers that take their values from the recipe's source."""
        return self.recipe.model.layers_from_source()

    @property
    def source_share(self) -> float:
        """Share of the source's layers in the summed squared norms of attention's outputs."""
        assert self.behaviour is not None
        squares = self.behaviour.attention
        return float(squares[self.source_layers].sum() / squares.sum())


@dataclass(frozen=True)
class Nearest:
    """A token's neighbours among the rows of a table and of the embedding, as texts."""

    text: str
    per_million: float
    values: list[tuple[str, float]]
    embedding: list[tuple[str, float]]

    @property
    def shared(self) -> int:
        """How many are among both."""
        return len({text for text, _ in self.values} & {text for text, _ in self.embedding})


@dataclass(frozen=True)
class FrequencyLosses:
    """Losses by the frequency of their target, in bins with at least LEAST_TARGETS."""

    centres: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    bins: np.ndarray
    """int64 `[N]`: of each target, its place among these; -1 for none."""
    losses: np.ndarray
    """float64 `[N]`"""
    samples: np.ndarray
    """int64 `[N]`: of each target, the held-out sample that it is in."""

    def difference_to(self, other: FrequencyLosses) -> tuple[np.ndarray, np.ndarray]:
        """Mean difference in each bin, this minus the other's, and its standard error, paired by target."""
        gains = self.losses - other.losses
        inside = [self.bins == place for place in range(len(self.centres))]
        errors = [clustered_error(gains[where], self.samples[where]) for where in inside]
        return np.array([gains[where].mean() for where in inside]), np.array(errors)


@dataclass(frozen=True)
class Findings:
    runs: list[Inspected]
    """The run, and the other one if there is one."""
    frequencies: Frequencies
    coefficients: list[Curve]
    tables: list[TableRows] = field(default_factory=list)
    neighbours_of: str = ""
    """The table whose rows' neighbours are shown."""
    nearest: list[Nearest] = field(default_factory=list)
    losses: list[FrequencyLosses] = field(default_factory=list)
    has_initial: bool = True
    """False in a run that was converted from elsewhere: where its tables began is not known."""


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of values that depend on each other within a cluster, as targets of one text do;
    `nan` for one cluster."""
    found, of_value = np.unique(clusters, return_inverse=True)
    if len(found) < 2:
        return float("nan")
    sums = np.bincount(of_value, weights=values - values.mean())
    return float(np.sqrt(np.square(sums).sum() * len(found) / (len(found) - 1)) / len(values))


def inspect(
    run_dir: Path, other: Path | None, options: Options, on_progress: Callable[[str], object] = lambda what: None
) -> Findings:
    """Look at a run, and at another one beside it for losses and attention.

    Raises RunFolderError, CheckpointError, DataError or EvaluationError where something is missing, or the two runs
    can't be compared.
    """
    runs = [_open(run_dir, options.step)]
    if other is not None:
        runs.append(_open(other, None))
    run = runs[0]
    encoder = run.target.encoder()
    if other is not None and runs[1].target.encoder().hash != encoder.hash:
        raise EvaluationError(f"{run_dir} and {other} have different tokenizers: their losses don't compare")
    data_sets = _open_data(run, encoder, options)
    on_progress("counting tokens")
    weights = [1.0] if options.data else [stream.weight for stream in streams_of(run.recipe.data)]
    frequencies = count_tokens(data_sets, weights, run.recipe.model.vocab_size, options.count_tokens)
    stored, recipe = StoredTensors(run.target.folder), run.recipe
    tables: list[TableRows] = []
    nearest: list[Nearest] = []
    if keys := table_keys(recipe.model):
        on_progress("reading tables")
        tables = read_tables(stored, recipe)
        asked = _asked(options.tokens, encoder, frequencies)
        on_progress("comparing rows")
        touched = (frequencies.counts > 0) & ~tables[-1].untouched
        nearest = _nearest(stored, list(keys.values())[-1], asked, touched, encoder, frequencies)
    losses: list[FrequencyLosses] = []
    if options.samples:
        samples = forward.held_out_samples(data_sets, options.samples)
        runs = [_observed(each, samples, options, on_progress) for each in runs]
        losses = losses_by_frequency([each.behaviour for each in runs if each.behaviour], frequencies)
    return Findings(
        runs, frequencies, _coefficients(run_dir, recipe), tables, tables[-1].label if tables else "", nearest, losses,
        has_initial=not (run_dir / run_folder.ORIGIN).exists(),
    )  # fmt: skip


def _open(run_dir: Path, step: int | None) -> Inspected:
    target = find_target(run_dir, step)
    if target.is_export:
        raise RunFolderError(f"{run_dir} is an export, without the run that it is of: give the run's folder")
    stored = checkpoint.read_run(target.folder)
    recipe = recipe_from_dict(compatibility.without_retired_values(stored["recipe"]))
    return Inspected(run_folder.run_dir_of(target.folder).resolve().name, target, stored["step"], recipe)


def _open_data(run: Inspected, encoder: Encoder, options: Options) -> list[DataSet]:
    recipe = run.recipe
    if options.data:
        recipe = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, path=str(options.data), remote=None, streams=[])
        )
    try:
        return open_data(recipe, encoder.hash)
    except DataError as error:
        raise DataError(f"{error}; or give the place of the run's data with --data") from error


def _coefficients(run_dir: Path, recipe: Recipe) -> list[Curve]:
    keys = {
        f"{name}/layer_{layer}": (words, layer)
        for name, words in COEFFICIENTS.items()
        for layer in recipe.model.layers_from_source()
    }
    if not keys or not (run_dir / run_folder.METRICS).exists():
        return []
    numbers = read_columns(run_dir, list(keys)).numbers
    curves = []
    for key, (words, layer) in keys.items():
        known = np.isfinite(numbers[key])
        if known.any():
            curves.append(Curve(words, layer, numbers["step"][known], numbers[key][known]))
    return curves


def _asked(texts: Sequence[str], encoder: Encoder, frequencies: Frequencies) -> list[int]:
    """Ids of the tokens to show: the named ones, or words spread over the frequencies."""
    if texts:
        return [_token_of(text, encoder) for text in texts]
    by_count = np.argsort(-frequencies.counts, kind="stable")
    by_count = by_count[: int((frequencies.counts >= 5).sum())]
    words = [int(token) for token in by_count if _is_word(encoder.fast.decode([int(token)]).strip())]
    if not words:
        return by_count[:ASKED].tolist()
    places = np.unique(np.geomspace(1, len(words), ASKED).astype(int)) - 1
    return [words[place] for place in places]


def _is_word(text: str) -> bool:
    return len(text) >= 3 and text.isalpha()


def _token_of(text: str, encoder: Encoder) -> int:
    ids = encoder.encode([text])[0].tolist()
    if len(ids) != 1:
        pieces = ", ".join(repr(encoder.fast.decode([token])) for token in ids)
        raise EvaluationError(f"--tokens {text!r} is {len(ids)} tokens ({pieces}); give one, a space before it counts")
    return ids[0]


def _nearest(
    stored: StoredTensors,
    key: str,
    asked: Sequence[int],
    allowed: np.ndarray,
    encoder: Encoder,
    frequencies: Frequencies,
) -> list[Nearest]:
    in_values = nearest_rows(stored, stored.weights_key(key), asked, allowed, NEIGHBOURS)
    in_embedding = nearest_rows(stored, embedding_key(stored), asked, allowed, NEIGHBOURS)

    def texts(found: list[Neighbour]) -> list[tuple[str, float]]:
        return [(token_text(neighbour.token, encoder), neighbour.cosine) for neighbour in found]

    per_million = frequencies.per_million()
    return [
        Nearest(token_text(token, encoder), float(per_million[token]), texts(values), texts(embedding))
        for token, values, embedding in zip(asked, in_values, in_embedding, strict=True)
    ]


def token_text(token: int, encoder: Encoder) -> str:
    """A token so that its spaces can be seen."""
    text = encoder.fast.decode([token], skip_special_tokens=False)
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    if "\ufffd" in shown:  # a part of a character
        shown = encoder.fast.id_to_token(token)
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[:LONGEST_TEXT]}…"


def _observed(run: Inspected, samples: np.ndarray, options: Options, on_progress: Callable[[str], object]) -> Inspected:
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        on_progress(f"{run.name}: {done} of {len(samples)} held-out samples")

    model = run.target.load(options.device)
    return dataclasses.replace(run, behaviour=forward.observe(model, samples, options.batch_size, progress))


def losses_by_frequency(behaviours: Sequence[Behaviour], frequencies: Frequencies) -> list[FrequencyLosses]:
    """Of each run, over the same targets."""
    centres = frequencies.centres()
    bins = frequencies.bins()[behaviours[0].targets]
    counts = np.bincount(bins[bins >= 0], minlength=len(centres))
    shown = np.flatnonzero(counts >= LEAST_TARGETS)
    place_of = np.full(len(centres) + 1, -1)  # the last is of -1
    place_of[shown] = np.arange(len(shown))
    places = place_of[bins]
    return [
        FrequencyLosses(
            centres[shown],
            counts[shown],
            np.array([behaviour.losses[places == place].mean() for place in range(len(shown))]),
            places,
            behaviour.losses,
            np.arange(len(places)) // behaviour.length,
        )
        for behaviour in behaviours
    ]
