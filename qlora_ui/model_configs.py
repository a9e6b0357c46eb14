"""A model's config.json, wherever it is: on this disk, shipped with the app, or on the Hub. Knows nothing of torch or Gradio."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qlora_ui.errors import UserError
from qlora_ui.memory.shapes import ModelShape, read_shape
from qlora_ui.stopping import Cancelled, abandonable

SHIPPED = Path(__file__).with_name("model_configs.yaml")
HUB_SECONDS = 4.0  # for a few hundred bytes


def find_shape(model: str, revision: str, models: Path) -> ModelShape:
    """The shape of a model by its id or folder. Raises UserError when it is nowhere to be had, or not understood."""
    return read_shape(find_config(model, revision, models), model)


def find_config(model: str, revision: str, models: Path) -> dict[str, Any]:
    """What its config.json says: in the workspace's models, in a folder, shipped, in the Hub's cache, on the Hub; the first counts."""
    try:
        folders = [folder for folder in (models / model.replace("/", "--"), Path(model).expanduser()) if (folder / "config.json").is_file()]
    except (OSError, RuntimeError):  # longer than a file's name may be; the home of a user that is not
        folders = []
    if folders:
        return _read(folders[0] / "config.json", model)
    if model in shipped():
        return shipped()[model]
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model {model!r} on this machine. Use a Hugging Face id (owner/name), or put its folder into {models}.",
            field="model",
        )
    return _read(_from_hub(model, revision), model)


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """The configs that come with the app, by model id."""
    configs: dict[str, dict[str, Any]] = yaml.safe_load(SHIPPED.read_text("utf-8"))
    return configs


def _read(path: Path, model: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The config.json of {model} cannot be read: {error}. Fetch or copy the model again.", field="model") from error
    if not isinstance(config, dict):
        raise UserError(f"The config.json of {model} is no JSON object. Fetch or copy the model again.", field="model")
    return config


def _from_hub(model: str, revision: str) -> Path:
    """The path of the file in the Hub's cache, fetched when it is not there."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,  # what its HTTP library raises, whichever that is
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch() -> str:
        HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)  # a download that is refused repeats itself first, aloud
        return hf_hub_download(model, "config.json", revision=revision, etag_timeout=HUB_SECONDS)

    until = time.monotonic() + HUB_SECONDS
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(abandonable(fetch, lambda: time.monotonic() > until))
    except GatedRepoError as error:
        raise UserError(f"{model} is gated: accept its licence on its Hub page and set HF_TOKEN to your token.", field="model") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"The Hub has no model {model!r} at revision {revision!r}, or it is private. Check the spelling, or set HF_TOKEN.",
            field="model",
        ) from error
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{model} has no config.json on the Hub. Choose another model.", field="model") from error
    except (Cancelled, HTTPError, OSError) as error:
        raise UserError(
            f"The Hugging Face Hub could not be asked for the shape of {model}. Check the connection and HF_TOKEN, "
            "or use a model on this machine.",
            field="model",
        ) from error
