"""The conversations that a person's browser keeps, the newest first, and one of them as a file. Knows nothing of models or Gradio."""

from __future__ import annotations

import json
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Turn = dict[str, Any]
Kept = dict[str, Any]
"""`open` is the id of the conversation on the page, `all` are all of them, each with `id`, `speaker`, `tuned` and `base`."""

NEW = ""
MOST = 100
MOST_CHARACTERS = 1_000_000  # browsers give a page about five million, and what is kept there gets longer


def keep(kept: Kept, current: str, speaker: str, tuned: Sequence[Turn], base: Sequence[Turn]) -> Kept:
    """With the conversation on the page as the newest; one that nothing was said in is not kept. The oldest leave a full list.

    One that was begun before the page knew its id may have been kept under another: the same words are kept once.
    """
    others = [conversation for conversation in _all(kept) if conversation["id"] != current]
    if not tuned:
        return {"open": NEW, "all": others}
    said = {"speaker": speaker, "tuned": spoken(tuned), "base": spoken(base)}
    mine = {"id": current or new_id(), **said}
    others = [conversation for conversation in others if {**conversation, **said} != conversation]
    room, fitting = MOST_CHARACTERS, list[dict[str, Any]]()
    for conversation in [mine, *others][:MOST]:
        room -= len(json.dumps(conversation))
        if room < 0 and fitting:
            break
        fitting.append(conversation)
    return {"open": mine["id"], "all": fitting}


def new_id() -> str:
    return secrets.token_hex(4)


def without(kept: Kept, current: str) -> Kept:
    """The others, and none on the page."""
    return {"open": NEW, "all": [conversation for conversation in _all(kept) if conversation["id"] != current]}


def find(kept: Kept, wanted: str) -> dict[str, Any]:
    """The conversation of that id; a new one when there is none."""
    empty = {"id": NEW, "speaker": "", "tuned": [], "base": []}
    return next((conversation for conversation in _all(kept) if conversation["id"] == wanted), empty)


def unanswered(turns: list[Turn]) -> tuple[list[Turn], str]:
    """The turns up to the last answer, and the question after it, if there is one."""
    return (turns[:-1], plain(turns[-1]["content"])) if turns and turns[-1]["role"] == "user" else (turns, "")


def choices(kept: Kept) -> list[tuple[str, str]]:
    """Title and id of each, and of a new one."""
    return [("New conversation", NEW), *((title(conversation), conversation["id"]) for conversation in _all(kept))]


def title(conversation: Mapping[str, Any]) -> str:
    """What it began with."""
    said = next((turn["content"] for turn in conversation["tuned"] if turn["role"] == "user"), "")
    return textwrap.shorten(said, 48, placeholder="…") or "…"


def _all(kept: Kept | None) -> list[dict[str, Any]]:
    return list((kept or {}).get("all") or [])


def spoken(history: Sequence[Turn]) -> list[dict[str, str]]:
    """Role and words of each turn."""
    return [{"role": turn["role"], "content": plain(turn["content"])} for turn in history]


def plain(content: str | list[dict[str, str]]) -> str:
    """The words of a turn, whose content may be a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def as_json(speaker: str, columns: Mapping[str, Sequence[Turn]]) -> str:
    """The file for other programs."""
    return json.dumps({"speaker": speaker, **columns}, indent=2, ensure_ascii=False)


def as_markdown(speaker: str, columns: Mapping[str, Sequence[Turn]]) -> str:
    """The file for people."""
    parts = [f"Talked to: {speaker}"]
    for name, turns in columns.items():
        parts.append(f"# {name.capitalize()}")
        parts += [f"**{turn['role'].capitalize()}**\n\n{turn['content']}" for turn in turns]
    return "\n\n".join(parts) + "\n"
