"""Conversations to tokens: the trained tokens are the assistant's words, exactly, in every prompt format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS, Collator, Encoded, encode, encode_rows, pieces, set_prompt_format
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

FORMATS = ("chatml", "guanaco", "tokenizer")
LONG = 100_000
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# What data/formats lets through; without a leading blank, see test_a_leading_blank_may_share_a_token_with_the_prompt.
text = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
    .filter(lambda t: t == t.lstrip())
    .filter(lambda t: not any(special in t for special in tiny.SPECIAL))
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    system = [Message(role="system", content=draw(text))] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    return system + [Message(role=role, content=said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]  # type: ignore[arg-type]


def tokenizer_in(prompt_format: str, template: str | None = None) -> Any:
    """The tiny tokenizer, its own template replaced when one is given, in a run's prompt format."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template or tiny.CHAT_TEMPLATE
    set_prompt_format(tokenizer, prompt_format)
    return tokenizer


def talk(*turns: str) -> list[Message]:
    return [Message(role=role, content=said) for role, said in zip(("user", "assistant") * len(turns), turns, strict=False)]  # type: ignore[arg-type]


def trained_texts(tokenizer: Any, row: Encoded) -> list[str]:
    return [said for said, trained in pieces(tokenizer, row) if trained]


def spoken(prompt_format: str, messages: Sequence[Message]) -> list[str]:
    """What the assistant says, as its format writes it."""
    lead = " " if prompt_format == "guanaco" else ""
    return [f"{lead}{message.content}<|im_end|>" for message in messages if message.role == "assistant"]


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(messages=conversations())
def test_the_trained_tokens_are_the_assistants_text_and_its_end_token(prompt_format: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_in(prompt_format)
    row = encode(tokenizer, messages, "assistant", LONG)
    assert trained_texts(tokenizer, row) == spoken(prompt_format, messages)
    assert tokenizer.decode(row.input_ids) == tokens.render(tokenizer, messages)[0]
    assert row.trained == sum(label != IGNORED for label in row.labels)
    assert not row.truncated


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(messages=conversations())
def test_train_on_last_trains_the_last_answer_only(prompt_format: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_in(prompt_format)
    assert trained_texts(tokenizer, encode(tokenizer, messages, "last", LONG)) == spoken(prompt_format, messages)[-1:]


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(messages=conversations())
def test_train_on_everything_trains_every_token_that_is_predicted(prompt_format: str, messages: list[Message]) -> None:
    row = encode(tokenizer_in(prompt_format), messages, "everything", LONG)
    assert row.labels == row.input_ids
    assert row.trained == len(row.input_ids) - 1


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(messages=conversations())
def test_what_is_asked_in_a_chat_is_what_stood_before_the_answer_in_training(prompt_format: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_in(prompt_format)
    trained = encode(tokenizer, messages, "last", LONG)
    asked = tokenizer(tokens.prompt(tokenizer, messages[:-1]), add_special_tokens=False)["input_ids"]
    assert trained.input_ids[: len(asked)] == asked
    assert [label == IGNORED for label in trained.labels] == [
        index < len(asked) or index >= end_of(trained) for index in range(len(trained.labels))
    ]


def end_of(row: Encoded) -> int:
    return max(index for index, label in enumerate(row.labels) if label != IGNORED) + 1


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(messages=conversations(), train_on=st.sampled_from(["assistant", "last", "everything"]), max_seq_len=st.integers(1, 80))
def test_a_long_row_is_cut_at_its_end(prompt_format: str, messages: list[Message], train_on: str, max_seq_len: int) -> None:
    tokenizer = tokenizer_in(prompt_format)
    whole, cut = (encode(tokenizer, messages, train_on, length) for length in (LONG, max_seq_len))
    assert cut.input_ids == whole.input_ids[:max_seq_len]
    assert cut.labels == whole.labels[:max_seq_len]
    assert cut.truncated == (len(whole.input_ids) > max_seq_len)


def test_a_leading_blank_may_share_a_token_with_the_prompt_and_nothing_of_the_answer_is_lost() -> None:
    tokenizer = tokenizer_in("chatml")
    row = encode(tokenizer, talk("Hi", "\n\nHello"), "assistant", LONG)
    assert trained_texts(tokenizer, row) == ["\n\n\nHello<|im_end|>"]


def test_a_row_cut_to_no_trained_token_is_set_aside_by_its_number() -> None:
    tokenizer = tokenizer_in("chatml")
    rows = [(1, talk("Hi", "Hello")), (5, talk("H" * 90, "Hello")), (7, talk("Hi", "H" * 90)), (9, talk("Hi", "", "a" * 60, "b"))]
    encoded = encode_rows(tokenizer, rows, "assistant", 60, lambda: False, lambda done: None)
    assert encoded.untrainable == [5]
    assert encoded.truncated == 3
    assert [len(row.input_ids) for row in encoded.rows] == [len(encode(tokenizer, rows[0][1], "assistant", 60).input_ids), 60, 60]
    assert encoded.tokens == sum(len(row.input_ids) for row in encoded.rows)
    assert encoded.trained_tokens == sum(row.trained for row in encoded.rows)
    last = encode_rows(tokenizer, rows, "last", 60, lambda: False, lambda done: None)
    assert last.untrainable == [5, 9]


def test_a_lone_first_token_is_never_predicted_so_its_row_is_set_aside() -> None:
    encoded = encode_rows(tokenizer_in("chatml"), [(1, talk("Hi", "Hello"))], "everything", 1, lambda: False, lambda done: None)
    assert encoded.untrainable == [1]


def test_encoding_tells_how_far_it_is_and_stops_at_the_next_row() -> None:
    tokenizer, rows, told = tokenizer_in("chatml"), [(number, talk("Hi", "Hello")) for number in range(1000)], list[int]()
    encode_rows(tokenizer, rows, "assistant", 60, lambda: False, told.append)
    assert told == [200, 400, 600, 800, 1000]
    told.clear()
    with pytest.raises(Cancelled):
        encode_rows(tokenizer, rows, "assistant", 60, lambda: len(told) == 2, told.append)
    assert told == [200, 400]


# Prompt formats ------------------------------------------------------------------------------------------------------------


def test_the_formats_write_what_their_names_promise() -> None:
    messages = [Message(role="system", content="S"), *talk("Q", "A", "R", "B")]
    expected = {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        "guanaco": "S\n### Human: Q\n### Assistant: A<|im_end|>### Human: R\n### Assistant: B<|im_end|>",
    }
    for prompt_format, written in expected.items():
        tokenizer = tokenizer_in(prompt_format)
        assert tokens.render(tokenizer, messages)[0] == written
        assert written.startswith(tokens.prompt(tokenizer, messages[:-1]))
        assert tokenizer.decode(encode(tokenizer, messages, "assistant", LONG).input_ids) == written


def test_a_marked_template_of_the_tokenizer_trains_what_it_marks() -> None:
    tokenizer = tokenizer_in("tokenizer", MARKED)
    row = encode(tokenizer, talk("Q", "A", "R", "B"), "assistant", LONG)
    assert trained_texts(tokenizer, row) == ["A<|im_end|>", "B<|im_end|>"]


@pytest.mark.parametrize("template", [MARKED, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")])
def test_a_template_that_refuses_a_conversation_is_one_sentence(template: str) -> None:
    tokenizer = tokenizer_in("tokenizer", template)
    with pytest.raises(UserError, match=r"refuses the conversation: no system turns\. Set prompt_format to chatml or guanaco\.") as caught:
        encode(tokenizer, [Message(role="system", content="S"), *talk("Q", "A")], "assistant", LONG)
    assert caught.value.field == "prompt_format"


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_everything_is_trained() -> None:
    forgetful = "{% for turn in messages %}{% if loop.last or turn['role'] == 'user' %}{{ turn['content'] }}{% endif %}{% endfor %}"
    tokenizer = tokenizer_in("tokenizer", forgetful)
    for train_on in ("assistant", "last"):
        with pytest.raises(UserError, match="rewrites earlier turns") as caught:
            encode(tokenizer, talk("Q", "A", "R", "B"), train_on, LONG)
        assert caught.value.field == "prompt_format"
    everything = encode(tokenizer, talk("Q", "A", "R", "B"), "everything", LONG)
    assert trained_texts(tokenizer, everything) == ["QRB"]


def test_the_default_of_several_templates_is_taken() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "other", "default": tiny.CHAT_TEMPLATE}
    set_prompt_format(tokenizer, "tokenizer")
    assert trained_texts(tokenizer, encode(tokenizer, talk("Q", "A"), "assistant", LONG)) == ["A<|im_end|>"]


@pytest.mark.parametrize("template", [None, "", {"tool_use": "other"}])
def test_a_tokenizer_without_a_template_is_refused_unless_the_run_brings_one(template: Any) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"has no chat template\. Set prompt_format to chatml or guanaco\.") as caught:
        set_prompt_format(tokenizer, "tokenizer")
    assert caught.value.field == "prompt_format"
    set_prompt_format(tokenizer, "guanaco")
    assert tokenizer.chat_template == tokens.TEMPLATES["guanaco"]


# Pieces and batches ---------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_row_are_its_text_cut_where_training_begins_and_ends() -> None:
    tokenizer = tokenizer_in("chatml")
    row = encode(tokenizer, talk("Q", "Grüße 🦙"), "assistant", LONG)
    assert pieces(tokenizer, row) == [
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", False),
        ("Grüße 🦙<|im_end|>", True),
        ("\n", False),
    ]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(lengths)
def test_a_batch_is_padded_at_the_right_and_padding_is_neither_read_nor_trained(lengths: list[int]) -> None:
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [IGNORED, *range(2, n + 1)], "truncated": False} for n in lengths]
    batch: dict[str, Any] = Collator(pad_token_id=0)(rows)  # type: ignore[arg-type]
    assert batch[REAL_TOKENS] == sum(lengths)
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].shape == (len(lengths), max(lengths))
        assert str(batch[key].dtype) == "torch.int64"
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        rest = max(lengths) - length
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [0] * rest  # type: ignore[operator]
        assert batch["labels"][index].tolist() == row["labels"] + [IGNORED] * rest  # type: ignore[operator]
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * rest
