"""Trackers that a run's metrics can go to as well: which are installed here, and logged in. Knows nothing of torch or Gradio."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from qlora_ui.errors import UserError

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that nothing can be sent to from here, as far as this machine knows without asking anybody."""
    for name in names:
        if not (find_spec(name) or (name == "tensorboard" and find_spec("tensorboardX"))):
            raise UserError(f"report_to names {name}, which is not installed. Install it with: pip install {name}", field="report_to")
    if "wandb" in names and not is_wandb_ready():
        raise UserError(
            "report_to names wandb, but there is no key for it on this machine. Log in with: wandb login, or set WANDB_API_KEY, "
            "or WANDB_MODE=offline to send it later.",
            field="report_to",
        )
    if "trackio" in names and os.environ.get("TRACKIO_SPACE_ID") and not has_hub_token():
        raise UserError(
            "report_to names trackio, which TRACKIO_SPACE_ID sends to a Space, but there is no Hugging Face token on this machine. "
            "Set HF_TOKEN, or unset TRACKIO_SPACE_ID to keep the metrics here.",
            field="report_to",
        )


def is_wandb_ready() -> bool:
    """Whether it needs no key, or has one: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, RuntimeError, netrc.NetrcParseError):  # none, or nobody's home; a damaged one holds no key that could be used
            continue
    return False


def has_hub_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def without_secrets(text: str) -> str:
    """The text, as it may be written down."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "…")
    return text
