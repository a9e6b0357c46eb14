"""The licence of a model or an adapter, as its card says. Knows nothing of torch or Gradio."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from qlora_ui.config import STARTER_MODEL
from qlora_ui.stopping import Cancelled, abandonable

HUB_SECONDS = 4.0


def of_folder(folder: Path) -> str:
    """What the card in a folder says; empty where it says nothing, or there is none."""
    from huggingface_hub import ModelCard

    try:
        return _named(ModelCard((folder / "README.md").read_text("utf-8", "replace"), ignore_metadata_errors=True).data)
    except (OSError, ValueError, yaml.YAMLError):  # there is no card, or none that can be read
        return ""


def of_model(model: str, models: Path) -> str:
    """Of a model in the workspace, in a folder, or on the Hub, which is asked for a few seconds at most; empty where nobody says."""
    if model == STARTER_MODEL:
        return "apache-2.0"
    here = next((folder for folder in (models / model.replace("/", "--"), Path(model)) if (folder / "config.json").is_file()), None)
    return of_folder(here) if here else _on_the_hub(model)


def _on_the_hub(model: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    until = time.monotonic() + HUB_SECONDS
    try:
        return _named(abandonable(lambda: HfApi().model_info(model, timeout=HUB_SECONDS).card_data, lambda: time.monotonic() > until))
    except (Cancelled, HFValidationError, HTTPError, OSError, ValueError):  # unreachable, private, or none
        return ""


def _named(card: Any) -> str:
    licence = str(card.get("license") or "") if card else ""
    return str(card.get("license_name") or licence) if licence == "other" else licence
