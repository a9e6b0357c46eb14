"""Conversations to tokens: the prompt format, which tokens are trained, the batch. Knows nothing of models, of other rows or Gradio.

A prompt format is a chat template. What is trained on is marked in the template with `{% generation %}`; for a
template without marks, a turn is what rendering it adds after the generation prompt.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_ui.data.formats import Message
from qlora_ui.engine import template_trial
from qlora_ui.errors import UserError

Span = tuple[int, int]

IGNORED = -100
REAL_TOKENS = "real_tokens"
RAW_TEXT: str = "text"
ROLES = ("pad", "eos", "bos")
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
    "alpaca": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.' }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' }}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% elif message['role'] == 'system' %}{{ message['content'] }}"
        "{% else %}{{ '\\n\\n### ' + ('Instruction' if message['role'] == 'user' else 'Input') + ':\\n' + message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    ),
}
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
OTHERS = "Set prompt_format to chatml, guanaco or alpaca, or mend the template."


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRow:
    """One conversation, uncut: its text, and of each token the id, the characters it stands for, and whether it is trained."""

    text: str
    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


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


def set_prompt_format(tokenizer: Any, prompt_format: str, chat_template: str = "") -> None:
    """Give the tokenizer the run's chat template, so that everything saved with it renders the same text.

    Raises UserError when the tokenizer's own template is asked for and there is none, or a person's own is no template.
    """
    if prompt_format == "custom":
        _check_template(tokenizer, chat_template)
        tokenizer.chat_template = chat_template
    elif prompt_format in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[prompt_format]
    elif isinstance(tokenizer.chat_template, dict):  # some have others besides, for tools or documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise UserError(f"This model's tokenizer has no chat template. {OTHERS}", field="prompt_format")


def add_new(tokenizer: Any, new_tokens: str) -> list[int]:
    """Add the tokens that the tokenizer lacks, and give those with `pad=`, `eos=` or `bos=` before them that role.

    Returns the ids of the added ones. Raises UserError for what is no token.
    """
    added = []
    for written in filter(None, (part.strip() for part in new_tokens.split(","))):
        role, is_role, token = written.partition("=")
        if role not in ROLES or not is_role:
            role, token = "", written
        if not token:
            raise UserError(f"new_tokens is {new_tokens!r}: {written!r} names no token. Write it as pad=<|pad|>.", field="new_tokens")
        if token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
            added.append(int(tokenizer.convert_tokens_to_ids(token)))
        if role:
            setattr(tokenizer, f"{role}_token", token)
    return added


def end_ids(tokenizer: Any) -> list[int]:
    """Tokens that end a turn: the tokenizer's end of text, and whatever closes an assistant turn in this prompt format."""
    sample = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    row = encode(tokenizer, sample, "assistant", max_seq_len=10_000)
    last = [label for label in row.labels if label != IGNORED][-1]
    ends = {tokenizer.eos_token_id, last if last in tokenizer.all_special_ids else None}
    return sorted(end for end in ends if end is not None)


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The text of a conversation in the tokenizer's format, and the character spans of the assistant's turns in it.

    A span begins after the generation prompt and ends with the turn's end token.
    """
    turns = _turns(messages)
    if MARKED.search(tokenizer.chat_template):
        text, spans = _rendered(tokenizer, turns, marks=True)
    else:
        text, _ = _rendered(tokenizer, turns)
        spans = [_turn_span(tokenizer, turns, index, text) for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    position = 0
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "assistant":
            said = turn["content"].strip()  # templates may strip a turn, but what is said is what is learned
            if (found := text.find(said, position)) < 0:
                raise UserError(f"The chat template leaves out what the assistant says in turn {number}. {OTHERS}", field="prompt_format")
            position = found + len(said)
    return text, spans


def _turn_span(tokenizer: Any, turns: list[dict[str, str]], index: int, text: str) -> Span:
    before, _ = _rendered(tokenizer, turns[:index], add_generation_prompt=True)
    until = text if index + 1 == len(turns) else _rendered(tokenizer, turns[: index + 1])[0]
    if not (text.startswith(until.rstrip()) and until.startswith(before)):
        raise UserError(
            f"The chat template rewrites earlier turns, so it cannot be told which tokens are the assistant's. {OTHERS}",
            field="prompt_format",
        )
    return len(before), len(until.rstrip())


def whole(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation, without asking whose it is: this also works for templates that rewrite earlier turns."""
    return _rendered(tokenizer, _turns(messages))[0]


def prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text that asks for the assistant's next turn."""
    text = _rendered(tokenizer, _turns(messages), add_generation_prompt=True)[0]
    return text + tokenizer.eos_token if is_encoder_decoder(tokenizer) else text


def is_encoder_decoder(tokenizer: Any) -> bool:
    """Whether the model behind this tokenizer (as `load_tokenizer` noted) reads a source and writes a target, as T5 does."""
    return getattr(tokenizer, "encoder_decoder", False)


def written(tokenizer: Any, messages: Sequence[Message], train_on: str) -> tuple[str, list[Span] | None]:
    """The text of a row, and the character spans that are trained; None means every token.

    Raw text is in no template: it is what the tokenizer makes of a text, and its end token, all of it trained.
    """
    if is_encoder_decoder(tokenizer):
        return _source_and_target(tokenizer, messages)
    if messages[0].role == RAW_TEXT:
        ids = tokenizer("")["input_ids"]
        start = tokenizer.bos_token if tokenizer.bos_token_id in ids[:1] else ""
        return start + messages[0].content + (tokenizer.eos_token or ""), None
    if train_on == "everything":
        return whole(tokenizer, messages), None
    text, spans = render(tokenizer, messages)
    return text, spans[-1:] if train_on == "last" else spans


def _source_and_target(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """An encoder-decoder's row in one line: what the encoder reads, its end token, and the last answer, which alone is trained.

    In one line rows are counted, cut, cached and shown as any others; `seq2seq.Collator` takes them apart.
    """
    if messages[0].role == RAW_TEXT:
        raise UserError(
            "is plain text, but an encoder-decoder model learns answers to questions. Use rows with both, or another model.", field="data"
        )
    text, spans = render(tokenizer, messages)
    start, end = spans[-1]
    source, target = text[:start] + tokenizer.eos_token, text[start:end].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    return source + target, [(len(source), len(source) + len(target))]


def token_rows(tokenizer: Any, rows: Sequence[tuple[str, list[Span] | None]]) -> list[TokenRow]:
    """Rows as `written` gives them to tokens. A token is trained when any of its characters is."""
    if not rows:  # which tokenizers do not take
        return []
    texts = [text for text, _ in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False)
    found = []
    for (text, spans), ids, pairs in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        offsets = np.array(pairs, np.int64).reshape(-1, 2)
        trained = np.ones(len(ids), bool) if spans is None else _within(offsets, spans)
        found.append(TokenRow(text=text, ids=np.array(ids, np.int32), offsets=offsets, trained=trained))
    return found


def _within(offsets: npt.NDArray[np.int64], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens overlap one of the spans, which are in order and apart."""
    if not spans:
        return np.zeros(len(offsets), bool)
    start, end = offsets.T
    starts, ends = np.array(spans, np.int64).T
    span = np.searchsorted(ends, start, side="right")  # the first that ends after the token begins
    inside: npt.NDArray[np.bool_] = (end > start) & (end > np.append(starts, np.iinfo(np.int64).max)[span])
    return inside


def encode(tokenizer: Any, messages: Sequence[Message], train_on: str, max_seq_len: int) -> Encoded:
    """One conversation as ids and labels, cut at `max_seq_len` tokens. `train_on` is assistant, last or everything."""
    row = token_rows(tokenizer, [written(tokenizer, messages, train_on)])[0]
    labels = np.where(row.trained, row.ids, IGNORED)
    return Encoded(input_ids=row.ids[:max_seq_len].tolist(), labels=labels[:max_seq_len].tolist(), truncated=len(row.ids) > max_seq_len)


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


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


# transformers notes the marked spans in the compiled template, which all threads share: a chat's rendering would add
# its spans to those of a training. One lock a template, because a person's template may take for ever.
_locks: dict[str, threading.Lock] = {}


def _rendered(
    tokenizer: Any, turns: list[dict[str, str]], *, marks: bool = False, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    try:
        return _run(tokenizer.chat_template, tokenizer, turns, marks, add_generation_prompt)
    except Exception as error:  # a template is somebody's program: whatever it raises is its own
        raise UserError(f"The chat template refuses the conversation: {_reason(error)}. {OTHERS}", field="prompt_format") from error


def _run(template: str, tokenizer: Any, turns: list[dict[str, str]], marks: bool, add_generation_prompt: bool) -> tuple[str, list[Span]]:
    with _locks.setdefault(template, threading.Lock()):
        texts, spans = render_jinja_template(
            [turns],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    return texts[0], [(start, end) for start, end in spans[0]] if marks else []


def _check_template(tokenizer: Any, template: str) -> None:
    """Raise UserError when this is not Jinja, or reaches for what the sandbox forbids. What it refuses is seen row by row."""
    if endless := template_trial.trouble(template):
        raise UserError(f"The chat template cannot be used: {endless}. Mend it, or choose another.", field="chat_template")
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text, spans = _run(template, tokenizer, turns, marks=MARKED.search(template) is not None, add_generation_prompt=False)
    except (TemplateSyntaxError, SecurityError) as error:
        raise UserError(
            f"The chat template cannot be used: {_reason(error)}. Mend it, or choose another.", field="chat_template"
        ) from error
    except Exception:  # noqa: BLE001  it may take other conversations than this one
        return
    if any("question" in text[start:end] for start, end in spans):
        raise UserError(
            "The chat template marks what the user says with {% generation %}: close the mark before the user's turn, "
            "or set train_on to everything.",
            field="chat_template",
        )


def _reason(error: Exception) -> str:
    """What a template raised, with its line, which Jinja puts into the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in ("<template>", "<unknown>")]
    line = error.lineno if isinstance(error, TemplateSyntaxError) else (lines or [None])[-1]
    said = str(error).strip().rstrip(".") or type(error).__name__
    return f"line {line}: {said}" if line else said
