"""Raw row -> messages, one small entry a format. Knows nothing of where rows come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qlora_ui.errors import UserError

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Who speaks. `text` is no turn but raw text that stands alone: no template is put around it, and all of it is trained."""
Row = Mapping[str, object]
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class BadRow(ValueError):
    """Why a row cannot be used: a short reason without the row's number."""


class EmptyAnswer(BadRow):
    """The row asks, and nothing answers."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    """What a format is called, how a row of it is told from others, and what such a row says.

    `fields` are its parts, each with the columns that it is read from, the first that a row has counting.
    """

    label: str
    fields: Mapping[str, tuple[str, ...]]
    recognise: Callable[[Row], bool]
    convert: Callable[[Row], list[list[Message]]]


def check(format: str) -> None:
    """Raise UserError when there is no such format."""
    if format != AUTO and format not in _KNOWN:
        raise UserError(f"There is no row format {format!r}. Use {AUTO} or one of {', '.join(_KNOWN)}.", field="data_format")


def detect(row: Row, fields: Collection[str] = ()) -> str | None:
    """The name of the first known format that the row has the columns (and, for text, the markers) of.

    Where a person has mapped `fields`, only formats that have all of them are meant.
    """
    meant = {name: known for name, known in _KNOWN.items() if known.fields.keys() >= set(fields)}
    # Tables of mixed rows have every column in every row: what is filled says more than what is there.
    filled = {column: value for column, value in row.items() if value not in (None, "", [])}
    whole = next((name for name, known in meant.items() if known.recognise(filled)), None)
    if whole not in (None, "text"):
        return whole
    # A question without its answer is still one, whatever text stands beside: Alpaca's rows repeat themselves in a column of that name.
    there = [name for name, known in meant.items() if known.recognise(row)]
    return next((name for name in there if not _READ[name].isdisjoint(filled)), there[0] if there else None)


def to_conversations(row: Row, format: str) -> tuple[tuple[Message, ...], ...]:
    """What the row says, nothing added; most formats hold one conversation a row.

    Raises BadRow when one of them cannot be trained on.
    """
    conversations = _KNOWN[format].convert(row)
    for messages in conversations:
        _check_turns(messages)
    return tuple(tuple(messages) for messages in conversations)


def unused(row: Row, format: str) -> list[str]:
    """The columns that the format does not look at."""
    read = _READ[format]
    return [column for column in row if column not in read]


def names_of(row: Row) -> str:
    """The row's columns in a sentence, as many as can be read in one."""
    names = [str(name).encode("unicode_escape").decode() if not str(name).isprintable() else str(name) for name in row]
    return ", ".join([name[:30] for name in names[:10]] + ["…"] * (len(names) > 10)) or "none"


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
    if messages[0].role == "text":
        _check_content(messages[0], "the text")
        return
    previous = "start"
    for number, message in enumerate(messages, 1):
        role = message.role
        if role not in _NEXT[previous]:
            if previous == "start":
                raise BadRow(f"starts with {_a(role)} turn")
            if role == previous:
                raise BadRow(f"turn {number} is a second {role} turn in a row")
            raise BadRow(f"turn {number} ({role}) cannot follow {_a(previous)} turn")
        _check_content(message, f"turn {number} ({role})")
        previous = role
    if previous in ("user", "tool"):
        raise EmptyAnswer(f"ends with {_a(previous)} turn that has no answer")
    if previous != "assistant":
        raise BadRow("has no user turn")


def _check_content(message: Message, place: str) -> None:
    if not message.content.strip():
        raise (EmptyAnswer if message.role == "assistant" else BadRow)(f"{place} is empty")
    if _LONE_SURROGATE.search(message.content):
        raise BadRow(f"{place} holds half a character (a lone surrogate), which no tokenizer can read")


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


def _turns(row: Row, column: str) -> list[list[Message]]:
    turns = _listed_value(row, column)
    system = _text(row, "system")
    head = [Message(role="system", content=system)] if system.strip() else []
    return [head + [_turn(turn, number) for number, turn in enumerate(turns, 1)]]


def _listed_value(row: Row, column: str) -> list[object]:
    """The column's list; tables without lists, such as CSV, hold it as JSON."""
    _check_column(row, column)
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"'{column}' is {_short(value)}, not a list of turns") from error
    if value in (None, "", []):
        raise BadRow(f"has no turns: '{column}' is empty")
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {_short(value)}, not a list of turns")
    return value


def _check_column(row: Row, *names: str) -> None:
    if not any(name in row for name in names):
        raise BadRow(f"has no column {names[0]!r}; columns: {names_of(row)}")


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


def _pair_messages(row: Row, pair: _Pair) -> list[list[Message]]:
    _check_column(row, *pair.question)
    _check_column(row, *pair.answer)
    asked, answered = _column(row, pair.question), _column(row, pair.answer)
    system, answer = _text(row, _column(row, pair.system)), _text(row, answered)
    parts = [_text(row, asked), _text(row, _column(row, pair.context)) if pair.context else ""]
    if pair.context_first:
        parts.reverse()
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise BadRow(f"has no question: '{asked}' is empty")
    if not answer.strip():
        raise EmptyAnswer(f"has no answer: '{answered}' is empty")
    head = [Message(role="system", content=system)] if system.strip() else []
    return [[*head, Message(role="user", content=question), Message(role="assistant", content=answer)]]


_INSTANCE = _Pair(question=("instruction_with_input", "instruction"), context=("input",), answer=("output",))


def _instances(row: Row, column: str) -> list[list[Message]]:
    """One instruction with several inputs, each with its answer."""
    found = []
    for number, instance in enumerate(_listed_value(row, column), 1):
        if not isinstance(instance, Mapping):
            raise BadRow(f"instance {number} is {_short(instance)}, not an input with its output")
        # The question is written out in each instance; where it is not, it is the row's instruction and the instance's input.
        whole = instance.get("instruction_with_input")
        asked = {**instance, "input": None} if whole else {"instruction": row.get("instruction"), **instance}
        try:
            found += _pair_messages(asked, _INSTANCE)
        except BadRow as error:
            raise type(error)(f"instance {number} {error}") from error
    return found


# One text with markers -----------------------------------------------------------------------------------------------


def _has_markers(row: Row, column: str, marker: re.Pattern[str]) -> bool:
    text = row.get(column)
    return isinstance(text, str) and marker.search(text) is not None


def _text_messages(row: Row, column: str, marker: re.Pattern[str]) -> list[list[Message]]:
    _check_column(row, column)
    preamble, *turns = marker.split(_text(row, column))
    if not turns:
        raise BadRow(f"'{column}' has no marker of a turn in it")
    # What stands before the first turn is addressed to the model, as a system prompt is: kept, not dropped unseen.
    head = [Message(role="system", content=preamble.strip())] if preamble.strip() else []
    return [
        head + [Message(role=_ROLES[role.lower()], content=content.strip()) for role, content in zip(turns[::2], turns[1::2], strict=True)]
    ]


def _raw_text(row: Row, column: str) -> list[list[Message]]:
    _check_column(row, column)
    return [[Message(role="text", content=_text(row, column))]]


# The known formats, the most telling first: a row with `messages` and `prompt` is a conversation -----------------------


def _has(column: str, row: Row) -> bool:
    return column in row


def _has_text(column: str, row: Row) -> bool:
    return isinstance(row.get(column), str)


def _listed(label: str, column: str, role: str, content: str) -> _Format:
    return _Format(
        label=label,
        fields={column: (column,), role: ("role", "from"), content: ("content", "value"), "system": ("system",)},
        recognise=partial(_has, column),
        convert=partial(_turns, column=column),
    )


def _paired(label: str, pair: _Pair) -> _Format:
    groups = [names for names in (pair.question, pair.context, pair.answer, pair.system) if names]
    return _Format(
        label=label,
        fields={names[0]: names for names in groups},
        recognise=partial(_has_pair, pair=pair),
        convert=partial(_pair_messages, pair=pair),
    )


def _marked(label: str, column: str, marker: str) -> _Format:
    pattern = re.compile(marker)
    return _Format(
        label=label,
        fields={column: (column,)},
        recognise=partial(_has_markers, column=column, marker=pattern),
        convert=partial(_text_messages, column=column, marker=pattern),
    )


_KNOWN: dict[str, _Format] = {
    "messages": _listed("Messages: a list of role and content", "messages", "role", "content"),
    "sharegpt": _listed("ShareGPT: conversations of from and value", "conversations", "from", "value"),
    "instances": _Format(
        label="Unnatural Instructions: instances of one instruction",
        fields={"instances": ("instances",), "instruction": ("instruction",)},
        recognise=partial(_has, "instances"),
        convert=partial(_instances, column="instances"),
    ),
    "alpaca": _paired(
        "Alpaca: instruction, input, output",
        _Pair(question=("instruction",), context=("input", "context"), answer=("output", "response")),
    ),
    "prompt-completion": _paired(
        "Prompt and completion: or input and output",
        _Pair(question=("prompt", "input"), answer=("completion", "response", "output")),
    ),
    "question-answer": _paired(
        "Question and answer: with a context or system prompt",
        _Pair(question=("question",), context=("context",), context_first=True, answer=("answer", "response")),
    ),
    "guanaco": _marked("Guanaco: text with ### Human: and ### Assistant:", "text", r"###[ \t]*(Human|Assistant|System)[ \t]*:"),
    "chip2": _marked("Chip2: text with <human>: and <bot>:", "text", r"<(human|bot)>[ \t]*:"),
    "hh-rlhf": _marked("HH-RLHF: the chosen text, with Human: and Assistant:", "chosen", r"(?:\A|\n\n)(Human|Assistant):"),
    "text": _Format(
        label="Raw text: all of it is trained, without a template",
        fields={"text": ("text",)},
        recognise=partial(_has_text, "text"),
        convert=partial(_raw_text, column="text"),
    ),
}
FORMATS: dict[str, str] = {name: known.label for name, known in _KNOWN.items()}
FIELDS: dict[str, Mapping[str, tuple[str, ...]]] = {name: known.fields for name, known in _KNOWN.items()}
_READ = {name: {column for columns in fields.values() for column in columns} for name, fields in FIELDS.items()}
