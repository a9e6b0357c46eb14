"""An export on the Hugging Face Hub. Knows nothing of weights or Gradio.

The token is the one that is given, else that of the environment or login. It is never written, and in no message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from qlora_ui.engine.model import hub_problem
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.stopping import Cancelled, abandonable

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]
Result = TypeVar("Result")

ANSWER_SECONDS = 4.0


def check(should_stop: ShouldStop, token: str = "") -> None:
    """Ask the Hub, before any work, whether it knows the token. Raises UserError or Cancelled, within five seconds."""
    if not (token or get_token()):
        raise UserError("Pushing needs a token that may write: set HF_TOKEN, or log in with: hf auth login", field="push")
    _asked(lambda: HfApi(token=token or None).whoami(), "Nothing was exported", should_stop)


def licence_of(model: str, should_stop: ShouldStop) -> str:
    """What the Hub says of a model's licence; empty where it says nothing, or knows no such model."""
    try:
        data = _asked(lambda: HfApi().model_info(model).card_data, model, should_stop)
    except UserError:
        return ""
    return str((data.get("license") if data else "") or "")


def push(folder: Path, repository: str, emit: Emit, should_stop: ShouldStop, token: str = "", private: bool = True) -> str:
    """Upload all of a folder in one commit and return its address. A repository that is not there is made.

    Raises UserError, or Cancelled: then nothing of it can be seen there.
    """
    api = HfApi(token=token or None)
    kept = f"{folder} is complete, but was not pushed to {repository}"
    emit(Log(text=f"Pushing to {repository}; where that is new, it is made {'private' if private else 'public'}"))
    _asked(lambda: api.create_repo(repository, private=private, exist_ok=True), kept, should_stop)
    done = _asked(
        lambda: api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from QLoRA UI"), kept, should_stop, None
    )
    emit(Log(text=f"Pushed: commit {done.oid[:12]}"))
    return str(done.repo_url)


def _asked(call: Callable[[], Result], so: str, should_stop: ShouldStop, seconds: float | None = ANSWER_SECONDS) -> Result:
    """What the Hub answers. Raises UserError that begins with `so`, also when it takes longer than that."""
    deadline = time.monotonic() + seconds if seconds else float("inf")
    try:
        return abandonable(call, lambda: should_stop() or time.monotonic() > deadline)
    except Cancelled as error:
        if should_stop():
            raise
        raise UserError(f"{so}: the Hugging Face Hub does not answer. Check the connection, then try again.", field="push") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(f"{so}: the Hub refuses the token. Give one that may write there.", field="push") from error
        raise UserError(f"{so}: {hub_problem(error)}.", field="push") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{so}: {hub_problem(error)}.", field="push") from error
