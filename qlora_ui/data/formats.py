"""Raw row -> messages, one small entry a format. Knows nothing of where rows come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class BadRow(ValueError):
    """Why a row cannot be used: a short reason without the row's number."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    """What a format is called, how a row of it is told from others, and what such a row says."""

    label: str
    recognise: Callable[[Row], bool]
    convert: Callable[[Row], list[Message]]


def detect(row: Row) -> str | None:
    """The name of the first known format that the row has the columns (and, for text, the markers) of."""
    # Tables of mixed rows have every column in every row: what is filled says more than what is there.
    filled = {column: value for column, value in row.items() if value not in (None, "", [])}
    return next((name for columns in (filled, row) for name, known in _KNOWN.items() if known.recognise(columns)), None)


def to_messages(row: Row, format: str) -> tuple[Message, ...]:
    """What the row says, nothing added. Raises BadRow when it is not a conversation that can be trained on."""
    messages = _KNOWN[format].convert(row)
    _check_turns(messages)
    return tuple(messages)


# Which turn may follow which. A chat template rejects or garbles other orders, long after this is easy to explain.
_NEXT: dict[str, tuple[Role, ...]] = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_turns(messages: list[Message]) -> None:
    previous = "start"
    for number, message in enumerate(messages, 1):
        role = message.role
        if role not in _NEXT[previous]:
            if previous == "start":
                raise BadRow(f"starts with {_a(role)} turn")
            if role == previous:
                raise BadRow(f"turn {number} is a second {role} turn in a row")
            raise BadRow(f"turn {number} ({role}) cannot follow {_a(previous)} turn")
        if not message.content.strip():
            raise BadRow(f"turn {number} ({role}) is empty")
        if _LONE_SURROGATE.search(message.content):
            raise BadRow(f"turn {number} ({role}) holds half a character (a lone surrogate), which no tokenizer can read")
        previous = role
    if previous in ("user", "tool"):
        raise BadRow(f"ends with {_a(previous)} turn that has no answer")
    if previous != "assistant":
        raise BadRow("has no user turn")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _text(row: Row, column: str) -> str:
    """The column's text, empty when the row has none. Other kinds are reported: guessing how to write them would invent data."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {_short(value)}, not text")
    return value


# Lists of turns ------------------------------------------------------------------------------------------------------

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def _turns(row: Row, column: str) -> list[Message]:
    turns = row[column]
    if turns is None or turns == []:
        raise BadRow(f"has no turns: '{column}' is empty")
    if not isinstance(turns, list):
        raise BadRow(f"'{column}' is {_short(turns)}, not a list of turns")
    system = _text(row, "system")
    head = [Message(role="system", content=system)] if system.strip() else []
    return head + [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn {number} is {_short(turn)}, not a role with its content")
    # Columns of Arrow tables are filled up with None, so "absent" and None are the same here.
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if role is None:
        raise BadRow(f"turn {number} has no role")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRow(f"turn {number} has the unknown role {_short(role)}")
    if turn.get("tool_calls"):
        raise BadRow(f"turn {number} ({role}) has tool_calls, which would be lost")
    if content is None:
        raise BadRow(f"turn {number} ({role}) is empty")
    if not isinstance(content, str):
        raise BadRow(f"turn {number} ({role}) is {_short(content)}, not text")
    return Message(role=_ROLES[role.lower()], content=content)


def _first(turn: Mapping[str, object], *keys: str) -> object:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


# Columns with a question and its answer ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Column names by what they hold; the first that a row has counts."""

    question: tuple[str, ...]
    answer: tuple[str, ...]
    context: tuple[str, ...] = ()
    context_first: bool = False
    system: tuple[str, ...] = ("system", "system_prompt")


def _has_pair(row: Row, pair: _Pair) -> bool:
    return any(name in row for name in pair.question) and any(name in row for name in pair.answer)


def _column(row: Row, names: tuple[str, ...]) -> str:
    """The first of these columns that is filled, else the first there is, else the first name."""
    present = [name for name in names if name in row]
    filled = [name for name in present if row[name] not in (None, "")]
    return (filled or present or list(names))[0]


def _pair_messages(row: Row, pair: _Pair) -> list[Message]:
    asked, answered = _column(row, pair.question), _column(row, pair.answer)
    system, answer = _text(row, _column(row, pair.system)), _text(row, answered)
    parts = [_text(row, asked), _text(row, _column(row, pair.context)) if pair.context else ""]
    if pair.context_first:
        parts.reverse()
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise BadRow(f"has no question: '{asked}' is empty")
    if not answer.strip():
        raise BadRow(f"has no answer: '{answered}' is empty")
    head = [Message(role="system", content=system)] if system.strip() else []
    return [*head, Message(role="user", content=question), Message(role="assistant", content=answer)]


# One text with markers -----------------------------------------------------------------------------------------------


def _has_markers(row: Row, column: str, marker: re.Pattern[str]) -> bool:
    text = row.get(column)
    return isinstance(text, str) and marker.search(text) is not None


def _text_messages(row: Row, column: str, marker: re.Pattern[str]) -> list[Message]:
    preamble, *turns = marker.split(_text(row, column))
    # What stands before the first turn is addressed to the model, as a system prompt is: kept, not dropped unseen.
    head = [Message(role="system", content=preamble.strip())] if preamble.strip() else []
    return head + [
        Message(role=_ROLES[role.lower()], content=content.strip()) for role, content in zip(turns[::2], turns[1::2], strict=True)
    ]


# The known formats, the most telling first: a row with `messages` and `prompt` is a conversation -----------------------


def _has(column: str, row: Row) -> bool:
    return column in row


def _listed(label: str, column: str) -> _Format:
    return _Format(label=label, recognise=partial(_has, column), convert=partial(_turns, column=column))


def _paired(label: str, pair: _Pair) -> _Format:
    return _Format(label=label, recognise=partial(_has_pair, pair=pair), convert=partial(_pair_messages, pair=pair))


def _marked(label: str, column: str, marker: str) -> _Format:
    pattern = re.compile(marker)
    return _Format(
        label=label,
        recognise=partial(_has_markers, column=column, marker=pattern),
        convert=partial(_text_messages, column=column, marker=pattern),
    )


_KNOWN: dict[str, _Format] = {
    "messages": _listed("Messages: a list of role and content", "messages"),
    "sharegpt": _listed("ShareGPT: conversations of from and value", "conversations"),
    "alpaca": _paired(
        "Alpaca: instruction, input, output",
        _Pair(question=("instruction",), context=("input", "context"), answer=("output", "response")),
    ),
    "prompt-completion": _paired(
        "Prompt and completion, or input and output",
        _Pair(question=("prompt", "input"), answer=("completion", "response", "output")),
    ),
    "question-answer": _paired(
        "Question and answer, with a context or system prompt",
        _Pair(question=("question",), context=("context",), context_first=True, answer=("answer", "response")),
    ),
    "guanaco": _marked("Guanaco: text with ### Human: and ### Assistant:", "text", r"###[ \t]*(Human|Assistant|System)[ \t]*:"),
    "chip2": _marked("Chip2: text with <human>: and <bot>:", "text", r"<(human|bot)>[ \t]*:"),
    "hh-rlhf": _marked("HH-RLHF: the chosen text, with Human: and Assistant:", "chosen", r"(?:\A|\n\n)(Human|Assistant):"),
}
FORMATS: dict[str, str] = {name: known.label for name, known in _KNOWN.items()}
