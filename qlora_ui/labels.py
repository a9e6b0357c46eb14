"""What a person calls a run and notes about it, in a file of its folder. Knows nothing of Gradio or torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from qlora_ui.disk import telling_trouble
from qlora_ui.errors import UserError
from qlora_ui.runs import Run, write_json

NAME = "label.json"
MOST_TITLE, MOST_NOTES = 80, 10_000


@dataclass(frozen=True, kw_only=True)
class Label:
    """A title for people, where the run's own name does not do, and notes. Raises UserError when they are too long."""

    title: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        for what, text, most in (("title", self.title, MOST_TITLE), ("notes", self.notes, MOST_NOTES)):
            if len(text) > most:
                raise UserError(f"The {what} of a run may have {most:,} characters, these are {len(text):,}. Shorten it.", field=what)


def load(run: Run) -> Label:
    """The run's label; an empty one where nobody gave one, or the file was damaged."""
    try:
        return Label(**json.loads((run.folder / NAME).read_text("utf-8")))
    except (OSError, ValueError, TypeError, UserError):
        return Label()


def save(run: Run, label: Label) -> None:
    """Keep the label beside the run. Raises UserError when the folder cannot be written."""
    with telling_trouble(run.folder):
        write_json(run.folder / NAME, asdict(label))


def title(run: Run) -> str:
    """What to call the run on a screen."""
    return load(run).title or run.name
