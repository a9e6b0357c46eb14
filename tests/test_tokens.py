"""Conversations to tokens: the trained tokens are the assistant's words, exactly, in every prompt format."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui.data.formats import Message
from qlora_ui.engine import template_trial, tokens
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS, Collator, Encoded, encode, set_prompt_format
from qlora_ui.errors import UserError

# A person's own, with and without marks, besides the ones with names.
CUSTOM = {
    "custom, marked": "{% for turn in messages %}[{{ turn.role }}]\n{% if turn.role == 'assistant' %}"
    "{% generation %}{{ turn.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ turn.content }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
    "custom, unmarked": "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
FORMATS = ("chatml", "guanaco", "alpaca", "tokenizer", *CUSTOM)
LONG = 100_000
FEW = settings(max_examples=30)
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
    set_prompt_format(tokenizer, "custom" if prompt_format in CUSTOM else prompt_format, CUSTOM.get(prompt_format, ""))
    return tokenizer


def talk(*turns: str) -> list[Message]:
    return [Message(role=role, content=said) for role, said in zip(("user", "assistant") * len(turns), turns, strict=False)]  # type: ignore[arg-type]


def trained_texts(tokenizer: Any, row: Encoded) -> list[str]:
    """The text of each stretch of trained tokens."""
    marked = zip(row.input_ids, row.labels, strict=True)
    stretches = itertools.groupby(marked, key=lambda token: token[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in stretch]) for trained, stretch in stretches if trained]


def spoken(prompt_format: str, messages: Sequence[Message]) -> list[str]:
    """What the assistant says, as its format writes it."""
    lead = " " if prompt_format == "guanaco" else ""
    return [f"{lead}{message.content}<|im_end|>" for message in messages if message.role == "assistant"]


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
@given(messages=conversations())
def test_the_trained_tokens_are_the_assistants_text_and_its_end_token(prompt_format: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_in(prompt_format)
    row = encode(tokenizer, messages, "assistant", LONG)
    assert trained_texts(tokenizer, row) == spoken(prompt_format, messages)
    assert tokenizer.decode(row.input_ids) == tokens.render(tokenizer, messages)[0]
    assert row.trained == sum(label != IGNORED for label in row.labels)
    assert not row.truncated


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
@given(messages=conversations())
def test_train_on_last_trains_the_last_answer_only(prompt_format: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_in(prompt_format)
    assert trained_texts(tokenizer, encode(tokenizer, messages, "last", LONG)) == spoken(prompt_format, messages)[-1:]


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
@given(messages=conversations())
def test_train_on_everything_trains_every_token_that_is_predicted(prompt_format: str, messages: list[Message]) -> None:
    row = encode(tokenizer_in(prompt_format), messages, "everything", LONG)
    assert row.labels == row.input_ids
    assert row.trained == len(row.input_ids) - 1


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
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
@FEW
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


def test_raw_text_is_in_no_template_and_every_token_of_it_is_trained() -> None:
    tokenizer = tokenizer_in("alpaca")
    for train_on in ("assistant", "last", "everything"):
        row = encode(tokenizer, [Message(role="text", content="Grüße\n\n### Response:\nthe")], train_on, LONG)
        assert tokenizer.decode(row.input_ids) == "Grüße\n\n### Response:\nthe<|im_end|>"
        assert row.labels == row.input_ids


def test_raw_text_begins_with_what_the_tokenizer_begins_a_text_with() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_in("chatml")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    row = encode(tokenizer, [Message(role="text", content="the")], "assistant", LONG)
    assert tokenizer.decode(row.input_ids) == "<|im_start|>the<|im_end|>"


# Prompt formats ------------------------------------------------------------------------------------------------------------


def test_the_formats_write_what_their_names_promise() -> None:
    messages = [Message(role="system", content="S"), *talk("Q", "A", "R", "B")]
    expected = {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        "guanaco": "S\n### Human: Q\n### Assistant: A<|im_end|>### Human: R\n### Assistant: B<|im_end|>",
        "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA<|im_end|>\n\n### Instruction:\nR\n\n### Response:\nB<|im_end|>",
    }
    for prompt_format, written in expected.items():
        tokenizer = tokenizer_in(prompt_format)
        assert tokens.render(tokenizer, messages)[0] == written
        assert written.startswith(tokens.prompt(tokenizer, messages[:-1]))
        assert tokenizer.decode(encode(tokenizer, messages, "assistant", LONG).input_ids) == written


def test_alpaca_without_a_system_turn_has_its_preamble_and_a_tools_answer_is_its_input() -> None:
    messages = [*talk("Q", "A"), Message(role="tool", content="T"), Message(role="assistant", content="B")]
    assert tokens.render(tokenizer_in("alpaca"), messages)[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nQ\n\n### Response:\nA<|im_end|>\n\n### Input:\nT\n\n### Response:\nB<|im_end|>"
    )


def test_a_marked_template_of_the_tokenizer_trains_what_it_marks() -> None:
    tokenizer = tokenizer_in("tokenizer", MARKED)
    row = encode(tokenizer, talk("Q", "A", "R", "B"), "assistant", LONG)
    assert trained_texts(tokenizer, row) == ["A<|im_end|>", "B<|im_end|>"]


@pytest.mark.parametrize("template", [MARKED, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")])
def test_a_template_that_refuses_a_conversation_is_one_sentence(template: str) -> None:
    tokenizer = tokenizer_in("tokenizer", template)
    with pytest.raises(UserError, match=r"refuses the conversation: line 1: no system turns\. Set prompt_format to chatml") as caught:
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


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for turn in messages %}\n{{ turn.content }\n{% endfor %}", "line 2: unexpected '}'"),
        ("{% generation %}{{ messages[0].content }}", "line 1: Unexpected end of template"),
        ("{{ messages | nonsense }}", "line 1: No filter named 'nonsense'"),
        (
            "{{ bos_token }}\n{{ messages[0].content.__class__.__mro__ }}",
            "line 2: access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append' of 'list' object is unsafe"),
    ],
)
def test_a_template_that_is_not_jinja_or_leaves_the_sandbox_is_refused_with_its_line(template: str, reason: str) -> None:
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(UserError) as caught:
        set_prompt_format(tokenizer, "custom", template)
    assert str(caught.value).startswith(f"The chat template cannot be used: {reason}")
    assert caught.value.field == "chat_template"
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content / 2 }}", "refuses the conversation: line 1: unsupported operand"),
        ("\n{{ 1 / 0 }}", "refuses the conversation: line 2: division by zero"),
        ("{% include 'other' %}", "refuses the conversation: line 1: no loader"),
        ("{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}", "leaves out what the assistant says in turn 2"),
        ("{% for turn in messages %}{{ turn.content[:1] }}{% endfor %}", "leaves out what the assistant says in turn 2"),
    ],
)
def test_a_template_that_fails_on_a_row_or_loses_the_answer_is_one_sentence(template: str, said: str) -> None:
    tokenizer = tiny.tiny_tokenizer()
    set_prompt_format(tokenizer, "custom", template)
    with pytest.raises(UserError, match=said) as caught:
        encode(tokenizer, talk("Q", "Answer"), "assistant", LONG)
    assert caught.value.field == "prompt_format"


def test_a_chat_that_renders_meanwhile_leaves_the_marks_of_a_training_alone() -> None:
    tokenizer, messages = tokenizer_in("chatml"), talk("Q", "A", "R", "B")
    alone = tokens.render(tokenizer, messages)
    stop = threading.Event()

    def chat() -> None:
        while not stop.is_set():
            tokens.whole(tokenizer, messages)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(chat)
        found = [tokens.render(tokenizer, messages) for _ in range(1000)]
        stop.set()
    assert all(rendered == alone for rendered in found)


def test_the_default_of_several_templates_is_taken() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "other", "default": tiny.CHAT_TEMPLATE}
    set_prompt_format(tokenizer, "tokenizer")
    assert trained_texts(tokenizer, encode(tokenizer, talk("Q", "A"), "assistant", LONG)) == ["A<|im_end|>"]


@pytest.mark.parametrize("template", [None, "", {"tool_use": "other"}])
def test_a_tokenizer_without_a_template_is_refused_unless_the_run_brings_one(template: Any) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        UserError, match=r"has no chat template\. Set prompt_format to chatml, guanaco or alpaca, or mend the template\."
    ) as caught:
        set_prompt_format(tokenizer, "tokenizer")
    assert caught.value.field == "prompt_format"
    set_prompt_format(tokenizer, "guanaco")
    assert tokenizer.chat_template == tokens.TEMPLATES["guanaco"]


# Batches --------------------------------------------------------------------------------------------------------------------


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


# Templates that would take the app along ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10**10 }}", "MiB for four short turns"),
        ("{{ '%2000000000d' % 5 }}", "MiB for four short turns"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
            " seconds",  # of its own, or on a machine that is busy on the clock
        ),
        ("{{ 'ab' * 1000000 }}", "it writes 2,000,000 characters for four short turns"),
        (
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}x",
            "MiB for four short turns",
        ),
    ],
)
def test_a_template_without_end_or_measure_is_refused_and_the_process_lives(template: str, said: str) -> None:
    with pytest.raises(UserError, match="The chat template cannot be used: ") as caught:
        set_prompt_format(tiny.tiny_tokenizer(), "custom", template)
    assert said in str(caught.value)
    assert caught.value.field == "chat_template"


@pytest.mark.parametrize("template", [*tokens.TEMPLATES.values(), *CUSTOM.values(), tiny.CHAT_TEMPLATE, MARKED])
def test_an_ordinary_template_passes_the_trial(template: str) -> None:
    assert template_trial.trouble(template) == ""


def test_a_template_that_marks_what_the_user_says_is_refused() -> None:
    with pytest.raises(UserError, match="marks what the user says"):
        set_prompt_format(
            tiny.tiny_tokenizer(),
            "custom",
            "{% for m in messages %}{% generation %}{{ m.role }}: {{ m.content }}{% endgeneration %}{% endfor %}",
        )
