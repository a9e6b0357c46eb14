"""What leaves a run, and to where: which of its weights, a target that is free, complete or absent. Knows nothing of torch or Gradio."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_ui import checkpoints
from qlora_ui.disk import telling_trouble, trouble_with_disk
from qlora_ui.errors import UserError
from qlora_ui.events import AdapterSaved, Event, HeldOut, Resumed, Step
from qlora_ui.runs import Run

Kind = Literal["adapter", "merged", "folder"]
AGAIN = "export again"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An adapter of a run on disk: its result, or one of its checkpoints. `why` says which was chosen, and for what reason."""

    folder: Path
    step: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to make of a run, and where. `repository` is the Hub's owner/name that it is pushed to, if any; new ones are made `private`."""

    run: Run
    kind: Kind
    weights: Weights
    target: Path
    quantize: bool = False
    repository: str = ""
    private: bool = True

    @property
    def is_zip(self) -> bool:
        return self.target.suffix.lower() == ".zip"


def plan(
    run: Run, kind: Kind, target: str, checkpoint: int | None = None, quantize: bool = False, repository: str = "", private: bool = True
) -> Export:
    """Look at all that can be looked at without loading anything. Raises UserError for what cannot be exported, or not to there."""
    if repository:
        check_repository(repository)
    weights, place = weights_of(run, checkpoint), free_target(target, run)
    export = Export(run=run, kind=kind, weights=weights, target=place, quantize=quantize, repository=repository, private=private)
    if quantize and kind != "merged":
        raise UserError(f"--quantize is for --merged: the base of an exported {kind} is quantized when it is loaded.")
    if repository and kind == "folder":
        raise UserError("--push is for --adapter and --merged. A folder that chats is for a disk.")
    if export.is_zip and (kind != "adapter" or repository):
        raise UserError(f"{export.target} ends in .zip, but only an adapter that is not pushed can be one file. Choose a folder.")
    return export


def check_repository(repository: str) -> None:
    """Raise UserError for what is no name on the Hub, which is not asked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(f"The repository is {repository!r}, which is no name on the Hub. Write it as owner/name.", field="push")


def weights_of(run: Run, checkpoint: int | None = None) -> Weights:
    """The run's result, or for a run that rests on its way the newest complete checkpoint, or the one of that step. Raises UserError."""
    state = run.state()
    if state == "running":
        raise UserError(f"{run.id} is training. Pause or stop it, then {AGAIN}.", field="run")
    if checkpoint is not None:
        return _checkpoint(run, checkpoint)
    if state not in ("finished", "stopped") and (newest := checkpoints.newest_complete(run)):
        step = checkpoints.step_of(newest)
        return Weights(folder=newest, step=step, why=f"{run.id} is {state}, so its newest complete checkpoint is exported: step {step}")
    if not run.adapter.is_dir():
        raise UserError(f"{run.id} has no adapter yet. Choose a run that was trained for at least a step.", field="run")
    step = [event.step for event in run.read()[0] if isinstance(event, AdapterSaved)][-1]
    return Weights(folder=run.adapter, step=step, why=f"The adapter of {run.id} is exported: step {step}")


def sealed_checkpoints(run: Run) -> list[Path]:
    """Those that say that they are complete, newest first: a look at names only."""
    return [folder for folder in checkpoints.all_of(run) if (folder / checkpoints.SEAL).exists()]


def has_weights(run: Run) -> bool:
    """Whether there is anything to export: a look at names only."""
    return run.adapter.is_dir() or bool(sealed_checkpoints(run))


def likely_weights(run: Run, checkpoint: int | None = None) -> Path | None:
    """The folder that `weights_of` would choose, by names only: whether it is damaged is not looked at."""
    there = sealed_checkpoints(run)
    if checkpoint is not None:
        return next((folder for folder in there if checkpoints.step_of(folder) == checkpoint), None)
    if there and run.state() not in ("finished", "stopped"):
        return there[0]
    return run.adapter if run.adapter.is_dir() else None


def _checkpoint(run: Run, step: int) -> Weights:
    folder = run.folder / f"checkpoint-{step}"
    if not folder.is_dir():
        there = ", ".join(str(checkpoints.step_of(other)) for other in reversed(checkpoints.all_of(run))) or "none"
        raise UserError(f"{run.id} has no checkpoint of step {step}. Checkpoints: {there}.", field="checkpoint")
    if wrong := checkpoints.damage(folder):
        raise UserError(f"{folder.name} of {run.id} cannot be used: {wrong}. Choose another.", field="checkpoint")
    return Weights(folder=folder, step=step, why=f"{folder.name} of {run.id} is exported, as asked")


def events_behind(weights: Weights, run: Run) -> list[Event]:
    """What the run told of these weights: no step that was undone by going on from before it, and none that came later."""
    told: list[Event] = []
    for event in run.read()[0]:
        if isinstance(event, Resumed):
            told = _up_to(event.step, told)
        told.append(event)
    return _up_to(weights.step, told)


def _up_to(step: int, events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, (Step, HeldOut)) or event.step <= step]


def free_target(wish: str, run: Run) -> Path:
    """Where to write. Raises UserError where something is already, inside the runs, or where nothing can be written."""
    if not wish.strip():
        raise UserError("The place to export to is empty. Name a folder, or for an adapter a file that ends in .zip.", field="to")
    try:
        target = Path(wish).expanduser().resolve()
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have; the home of a user that is not
        raise UserError(f"{wish!r} cannot be written to: {error}. Choose another place.", field="to") from error
    if target.is_relative_to(run.workspace.runs):
        raise UserError(f"{target} lies among the runs, which belong to the app. Choose a place outside {run.workspace.runs}.", field="to")
    if taken:
        raise UserError(f"{target} exists already, and nothing is overwritten. Choose another name, or remove it.", field="to")
    above = next(place for place in target.parents if place.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file, so that nothing can lie in it. Choose another place.", field="to")
    if trouble := trouble_with_disk(existing_parent(target), then=AGAIN):
        raise UserError(trouble, field="to")
    return target


def gguf_commands(folder: str, to: str) -> list[str]:
    """What makes a GGUF file of a merged model in 16 bits: llama.cpp's own script, which no package carries."""
    return [
        "git clone https://github.com/ggml-org/llama.cpp",
        "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt",
        f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(folder)} --outfile {shlex.quote(to)} --outtype bf16",
    ]


def existing_parent(target: Path) -> Path:
    """The folder that is there already, of those above the target."""
    return next(folder for folder in target.parents if folder.is_dir())


def check_space(target: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError when the disk has less room than that."""
    folder = existing_parent(target)
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise UserError(
            f"{what} needs {size_words(needed_bytes)} while it is made, but the disk of {folder} has {size_words(free)} free. "
            "Free some space, or export to another disk.",
            field="to",
        )


def size_words(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def bytes_in(folder: Path) -> int:
    """What a file, or all files in a folder, take."""
    return folder.stat().st_size if folder.is_file() else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """A name in a folder beside the target to write to; it becomes the target in one rename at the end, or all of it is gone."""
    made = [folder for folder in target.parents if not folder.exists()]
    aside = target.with_name(f".partial-{secrets.token_hex(4)}")  # without its name, which may be as long as a name can be
    with telling_trouble(existing_parent(target), AGAIN):
        try:
            aside.mkdir(parents=True)
            yield aside / "export"
            for path in aside.rglob("*"):
                if path.is_file():
                    with path.open("rb") as written:
                        os.fsync(written.fileno())
            (aside / "export").rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # it was never made, or somebody put something there
                    folder.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
