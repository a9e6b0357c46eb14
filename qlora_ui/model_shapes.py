"""A model's shape, whatever its architecture. Knows nothing of Gradio; torch is imported only to count what no reader knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_ui.errors import UserError
from qlora_ui.memory.shapes import READERS, ModelShape, read_shape
from qlora_ui.model_configs import find_config

# By the last word of its name in a config: far more than any model has, and few enough to be built and counted one by one.
AT_MOST = {"layer": 1000, "layers": 1000, "depth": 1000, "labels": 100_000}
AT_LEAST_ONE = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "vocab_size", "hidden_size", "n_embd", "d_model")


class NotCounted(Exception):
    """torch is needed to count this shape, and was not to be used."""


def find_shape(model: str, revision: str, models: Path, *, with_torch: bool = True) -> ModelShape:
    """The shape of a model by its id or folder. Raises UserError when it is nowhere to be had, or not understood."""
    return shape_of(find_config(model, revision, models), model, with_torch)


def find_shape_within(model: str, revision: str, models: Path, *, with_torch: bool = True) -> ModelShape:
    """For a page: no folder outside the workspace is looked at, and nobody is asked. Raises NotHere where the Hub would have to be."""
    return shape_of(find_config(model, revision, models, within=models.parent, ask_hub=False), model, with_torch)


def shape_of(config: Mapping[str, Any], model: str, with_torch: bool) -> ModelShape:
    """Read from the config, or counted on transformers' own model. Raises NotCounted where that is wanted `with_torch` left out."""
    check_counts(config, model)
    if str(config.get("model_type")) in READERS:
        return read_shape(config, model)
    if not with_torch:
        raise NotCounted(model)
    from qlora_ui.engine import outline

    return outline.count_shape(config, model)


def check_counts(config: Mapping[str, Any], model: str) -> None:
    """Raise UserError for numbers that no model has, before so many layers are made."""
    parts = [config]
    for part in parts:  # it grows
        parts.extend(value for value in part.values() if isinstance(value, Mapping))
        for name, value in part.items():
            most = AT_MOST.get(str(name).rpartition("_")[2])
            least = 1 if part is config and name in AT_LEAST_ONE else None
            if isinstance(value, int) and ((most and value > most) or (least and value < least)):
                said = f"{name} is {value:,}, but it must be {'at least 1' if least and value < least else f'at most {most:,}'}"
                raise UserError(f"In the config.json of {model}, {said}. Fetch or copy the model again.", field="model")
