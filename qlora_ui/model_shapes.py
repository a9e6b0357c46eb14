"""A model's shape, whatever its architecture. Knows nothing of Gradio; torch is imported only to count what no reader knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_ui.memory.shapes import READERS, ModelShape, read_shape
from qlora_ui.model_configs import find_config


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
    if config.get("model_type") in READERS:
        return read_shape(config, model)
    if not with_torch:
        raise NotCounted(model)
    from qlora_ui.engine import outline

    return outline.count_shape(config, model)
