"""Conversations to tokens: the prompt format, which tokens are trained, the cut, the batch. Knows nothing of models or Gradio.

A prompt format is a chat template. What is trained on is marked in the template with `{% generation %}`; for a
tokenizer's own template without marks, a turn is what rendering it adds after the generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

IGNORED = -100
REAL_TOKENS = "real_tokens"
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "guanaco": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ '### Assistant:' }}"
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        "{% elif message['role'] == 'user' %}{{ '### Human: ' + message['content'] + '\\n' }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
    ),
}
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One row as the model sees it. `labels` are the ids where the token is trained and IGNORED elsewhere, unshifted."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def trained(self) -> int:
        """Number of trained tokens. The first token of a row is never predicted, so it never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(kw_only=True)
class EncodedRows:
    """The rows that can be trained on, and what was done to the others."""

    rows: list[Encoded] = field(default_factory=list)
    truncated: int = 0
    untrainable: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        return sum(row.trained for row in self.rows)


def set_prompt_format(tokenizer: Any, prompt_format: str) -> None:
    """Give the tokenizer the run's chat template, so that everything saved with it renders the same text.

    Raises UserError when the tokenizer's own template is asked for and there is none.
    """
    if prompt_format in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[prompt_format]
    elif isinstance(tokenizer.chat_template, dict):  # some have others besides, for tools or documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise UserError(
            "This model's tokenizer has no chat template. Set prompt_format to chatml or guanaco.",
            field="prompt_format",
        )


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation in the tokenizer's format, and the character spans of the assistant's turns in it.

    A span begins after the generation prompt and ends with the turn's end token.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if MARKED.search(tokenizer.chat_template):
        try:
            texts, spans = render_jinja_template(
                [turns], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
            )
        except TemplateError as error:
            raise _refusal(error) from error
        return texts[0], [(start, end) for start, end in spans[0]]
    text = _plain(tokenizer, turns)
    found = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = _plain(tokenizer, turns[:index], add_generation_prompt=True)
            until = _plain(tokenizer, turns[: index + 1])
            if not (text.startswith(until.rstrip()) and until.startswith(before)):
                raise UserError(
                    "This model's chat template rewrites earlier turns, so it cannot be told which tokens are the assistant's. "
                    "Set prompt_format to chatml or guanaco.",
                    field="prompt_format",
                )
            found.append((len(before), len(until.rstrip())))
    return text, found


def whole(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation, without asking whose it is: this also works for templates that rewrite earlier turns."""
    return _plain(tokenizer, [{"role": message.role, "content": message.content} for message in messages])


def prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text that asks for the assistant's next turn."""
    return _plain(tokenizer, [{"role": message.role, "content": message.content} for message in messages], add_generation_prompt=True)


def encode(tokenizer: Any, messages: Sequence[Message], train_on: str, max_seq_len: int) -> Encoded:
    """One conversation as ids and labels, cut at `max_seq_len` tokens. `train_on` is assistant, last or everything."""
    text, spans = (whole(tokenizer, messages), []) if train_on == "everything" else render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if train_on == "everything":
        labels = list(ids)
    else:
        wanted = spans[-1:] if train_on == "last" else spans
        labels = [IGNORED] * len(ids)
        position = 0
        for index, (start, end) in enumerate(encoded["offset_mapping"]):
            while position < len(wanted) and start >= wanted[position][1]:
                position += 1
            if position < len(wanted) and end > wanted[position][0] and end > start:
                labels[index] = ids[index]
    return Encoded(input_ids=ids[:max_seq_len], labels=labels[:max_seq_len], truncated=len(ids) > max_seq_len)


def encode_rows(
    tokenizer: Any,
    conversations: Iterable[tuple[int, Sequence[Message]]],
    train_on: str,
    max_seq_len: int,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> EncodedRows:
    """Encode numbered conversations. A row without a trained token left is set aside, by number. Raises Cancelled."""
    result = EncodedRows()
    for count, (number, messages) in enumerate(conversations, 1):
        if should_stop():
            raise Cancelled
        row = encode(tokenizer, messages, train_on, max_seq_len)
        result.truncated += row.truncated
        if row.trained:
            result.rows.append(row)
        else:
            result.untrainable.append(number)
        if count % 200 == 0:
            on_progress(count)
    return result


def pieces(tokenizer: Any, row: Encoded) -> list[tuple[str, bool]]:
    """The row as text, cut where trained and untrained tokens meet: (text, is it trained)."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        trained = label != IGNORED
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token)
        else:
            runs.append(([token], trained))
    return [(tokenizer.decode(ids), trained) for ids, trained in runs]


class Collator:
    """Rows to a batch, padded at the right to the longest row."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        """Three int64 tensors of shape (rows, longest), and the number of tokens that are not padding."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": mask,
            REAL_TOKENS: sum(len(row["input_ids"]) for row in rows),
        }


def _plain(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise _refusal(error) from error
    return text


def _refusal(error: TemplateError) -> UserError:
    return UserError(
        f"This model's chat template refuses the conversation: {error}. Set prompt_format to chatml or guanaco.", field="prompt_format"
    )
