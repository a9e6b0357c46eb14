"""A model's config.json, wherever it is: on this disk, shipped with the app, or on the Hub. Knows nothing of torch or Gradio."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled, abandonable

SHIPPED = Path(__file__).with_name("model_configs.yaml")
HUB_SECONDS = 4.0  # for a few hundred bytes


class NotHere(UserError):
    """The model's shape is not on this machine; the Hub may have it."""


def find_config(model: str, revision: str, models: Path, *, within: Path | None = None, ask_hub: bool = True) -> dict[str, Any]:
    """What its config.json says: in the workspace's models, in a folder, shipped, in the Hub's cache, on the Hub; the first counts."""
    try:
        folders, folder = [models / model.replace("/", "--")], Path(model).expanduser()
        if within is None or folder.resolve().is_relative_to(within.resolve()):
            folders.append(folder)
        found = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    except (OSError, RuntimeError, ValueError):  # longer than a file's name may be; the home of a user that is not; a NUL
        found = []
    if found:
        return _read(found[0], model)
    if model in shipped():
        return shipped()[model]
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model {model!r} on this machine. Use a Hugging Face id (owner/name), or put its folder into {models}.",
            field="model",
        )
    cached = _from_cache(model, revision)
    if not (cached or ask_hub):
        raise NotHere(f"The shape of {model} is not on this machine, so its memory cannot be counted yet.", field="model")
    return _read(cached or _from_hub(model, revision), model)


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """The configs that come with the app, by model id."""
    configs: dict[str, dict[str, Any]] = yaml.safe_load(SHIPPED.read_text("utf-8"))
    return configs


def _read(path: Path, model: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The config.json of {model} cannot be read: {error}. Fetch or copy the model again.", field="model") from error
    if not isinstance(config, dict):
        raise UserError(f"The config.json of {model} is no JSON object. Fetch or copy the model again.", field="model")
    return config


def _from_cache(model: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no name that the Hub could have: it says so better
        return None
    return Path(cached) if isinstance(cached, str) else None


def _from_hub(model: str, revision: str) -> Path:
    """The path of the file in the Hub's cache, where it is put."""
    from huggingface_hub import HfApi, hf_hub_download
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
