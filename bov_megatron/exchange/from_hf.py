"""An export of ours, of `to-hf` or saved again by transformers, back into a run that trains on."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bov_megatron.checkpoint.compatibility import without_retired_values
from bov_megatron.data.tokenizer import copy_tokenizer, load_encoder
from bov_megatron.errors import ConversionError, ExportError, RecipeError
from bov_megatron.exchange.export import TRAINING_FILE, hf_config, raise_if_different
from bov_megatron.exchange.needs import Needs, needs_of_run
from bov_megatron.exchange.new_run import NewRun, check_is_new, write_run
from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig, recipe_from_dict
from bov_megatron.recipe.fields import TARGET_LAYERS
from bov_megatron.recipe.value_sources import PROJECTION

CONFIG_FILE = "config.json"


def from_hf(export_dir: Path, run_dir: Path) -> NewRun:
    """Make a run folder whose only checkpoint holds the export's weights, at the step that it was exported at.

    Step, recipe and data position are those in the export's training.json; without one (transformers drops it) the step
    is 0 and the recipe has defaults but for the model. Files of weights are read one tensor at a time.

    Raises ConversionError; nothing is then left of `run_dir`.
    """
    check_is_new(run_dir)
    recipe, weights, trained = _read_export(export_dir)
    step = trained.get("step", 0)
    return write_run(
        run_dir,
        recipe,
        weights,
        step=step,
        origin={"export": str(export_dir.resolve()), "step": step},
        write_tokenizer=_tokenizer_writer(export_dir, recipe.model.vocab_size),
        shards=trained.get("shards"),
    )


def plan_from_hf(export_dir: Path) -> Needs:
    """What `from_hf` needs. Raises ConversionError as it does."""
    return needs_of_run(_read_export(export_dir)[0].model)


def _read_export(export_dir: Path) -> tuple[Recipe, ExportedWeights, dict[str, Any]]:
    """Recipe, weights, and what training.json says."""
    config = _read_json(export_dir / CONFIG_FILE)
    if config.get("model_type") != "bov":
        raise ConversionError(f"{export_dir} holds a model of type {config.get('model_type')!r}, not an export of ours")
    if config.get("table_dtype") is not None:
        raise ConversionError(
            f"{export_dir} has value tables in {config['table_dtype']}, which no longer are those of the run; export "
            "it again without --tables int8"
        )
    trained = _read_json(export_dir / TRAINING_FILE) if (export_dir / TRAINING_FILE).is_file() else {}
    recipe = _recipe(config, trained.get("recipe"), trained.get("step", 0), export_dir)
    weights = ExportedWeights(export_dir)
    try:
        raise_if_different(weights.shapes(), recipe.model)
    except ExportError as error:
        raise ConversionError(f"{export_dir}: {error}") from None
    return recipe, weights, trained


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} is not an export: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} doesn't hold an object, but {type(values).__name__}")
    return values


def _recipe(config: dict[str, Any], stored: dict[str, Any] | None, step: int, export_dir: Path) -> Recipe:
    """The recipe of the run that was exported, or one for the configuration's model alone."""
    source = export_dir / (TRAINING_FILE if stored is not None else CONFIG_FILE)
    try:
        if stored is None:
            recipe = Recipe(model=_model_of(config))
            recipe.train.steps = max(step, 1)
        else:
            recipe = recipe_from_dict(without_retired_values(stored))
            recipe.model = dataclasses.replace(recipe.model, vocab_size=config["vocab_size"])
        recipe = recipe_from_dict(recipe.to_dict())
        wanted = json.loads(hf_config(recipe.model).to_json_string(use_diff=False))
    except KeyError as error:
        raise ConversionError(f"{source} lacks {error}") from None
    except (RecipeError, ValueError, TypeError) as error:
        raise ConversionError(f"{source}: {error}") from None
    for name in _DECIDING:
        if config.get(name, wanted[name]) != wanted[name]:
            raise ConversionError(
                f"{export_dir / CONFIG_FILE} has {name}={config[name]!r}, but the recipe made of {source} gives "
                f"{wanted[name]!r}: no run computes both"
            )
    return recipe


# Fields of the configuration that decide what the model computes.
_DECIDING = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "windows", "value_source", "value_source_facts"),
    *("target_layers", "value_coefficient", "value_table", "rotary_base", "logit_softcap", "qk_scale"),
)


def _model_of(config: dict[str, Any]) -> ModelConfig:
    """The model section of a recipe from an export's configuration."""
    length, layers = config["max_position_embeddings"], config["num_hidden_layers"]
    pattern = "".join("L" if window == length else "S" for window in config["windows"])
    model = ModelConfig(
        num_layers=layers,
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        sequence_length=length,
        window_pattern=pattern,
        rotary_base=config["rotary_base"],
        logit_softcap=config["logit_softcap"],
        qk_scale=config["qk_scale"],
        value=ValueConfig(
            source=config["value_source"],
            target_layers=config["target_layers"],
            coefficient=config["value_coefficient"],
            table=config["value_table"],
        ),
    )
    for name in TARGET_LAYERS:
        named = dataclasses.replace(model, value=dataclasses.replace(model.value, target_layers=name))
        if model.value.source == PROJECTION or named.layers_from_source() == config["target_layers"]:
            return named
    return model


class ExportedWeights:
    """Tensors of an export by canonical name, read when they are asked for. Raises ConversionError."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
        else:
            file = folder / "model.safetensors"
            with self._opened(file) as opened:
                self._files = dict.fromkeys(opened.keys(), file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for name, file in self._files.items():
            with self._opened(file) as opened:
                if name not in opened.keys():  # noqa: SIM118 (not a mapping)
                    raise ConversionError(f"{file} lacks {name}, which the index of the export says is there")
                shapes[name] = tuple(opened.get_slice(name).get_shape())
        return shapes

    def __call__(self, name: str) -> Tensor:
        with self._opened(self._files[name]) as opened:
            return opened.get_tensor(name)

    @staticmethod
    def _opened(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise ConversionError(f"{file} is missing: the export is incomplete") from None
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{file} is damaged or incomplete: {error}") from None


def _tokenizer_writer(folder: Path, vocab_size: int):
    """A function that copies the export's tokenizer into a folder; None where there is none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    encoder = load_encoder(folder)
    if encoder.vocab_size > vocab_size:
        raise ConversionError(f"{folder}: its tokenizer has {encoder.vocab_size} ids, its model {vocab_size}")
    return functools.partial(copy_tokenizer, encoder)
