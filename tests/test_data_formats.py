"""What a row of each format says, and what is said of a row that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.data.formats import FORMATS, BadRow, EmptyAnswer, Message, Row, check, detect, to_conversations, unused
from qlora_ui.errors import UserError


def to_messages(row: Row, format: str) -> tuple[Message, ...]:
    """The row's only conversation."""
    (messages,) = to_conversations(row, format)
    return messages


HELLO = [("user", "Hi"), ("assistant", "Hello.")]
ROWS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "prompt": "Hi"}, HELLO),
    (
        "messages",
        {"messages": [{"role": r, "content": c, "from": None} for r, c in [("system", "Be kind."), *HELLO]]},
        [("system", "Be kind."), *HELLO],
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, HELLO),
    ("sharegpt", {"conversations": [{"role": "user", "content": "Hi"}, {"role": "Assistant", "content": "Hello."}]}, HELLO),
    (
        "sharegpt",
        {
            "system": "Use tools.",
            "conversations": [{"from": f, "value": v} for f, v in [("human", "2+2?"), ("gpt", "add(2,2)"), ("tool", "4"), ("gpt", "4.")]],
        },
        [("system", "Use tools."), ("user", "2+2?"), ("assistant", "add(2,2)"), ("tool", "4"), ("assistant", "4.")],
    ),
    ("alpaca", {"instruction": "Hi", "output": "Hello."}, HELLO),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello.", "text": "### Human: no"}, HELLO),
    ("alpaca", {"instruction": "Add", "input": "2, 2", "output": "4"}, [("user", "Add\n\n2, 2"), ("assistant", "4")]),
    (
        "alpaca",
        {"instruction": "Sum up", "context": "Long.", "response": "Short.", "category": "x"},
        [("user", "Sum up\n\nLong."), ("assistant", "Short.")],
    ),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello."}, HELLO),
    ("prompt-completion", {"prompt": "Hi", "response": "Hello."}, HELLO),
    ("prompt-completion", {"input": "Hi", "output": "Hello."}, HELLO),
    ("question-answer", {"question": "Hi", "answer": "Hello."}, HELLO),
    (
        "question-answer",
        {"context": "It is noon.", "question": "Time?", "answer": "12"},
        [("user", "It is noon.\n\nTime?"), ("assistant", "12")],
    ),
    ("question-answer", {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello."}, [("system", "Be kind."), *HELLO]),
    ("guanaco", {"text": "### Human: Hi ### Assistant: Hello."}, HELLO),
    ("guanaco", {"text": "### Human: Hi### Assistant: Hello."}, HELLO),
    ("guanaco", {"text": "### Human:\n\nHi\n\n### Assistant:\nHello.\n"}, HELLO),
    (
        "guanaco",
        {"text": "A chat.\n### Human: Hi\n### Assistant: a # b ## c"},
        [("system", "A chat."), ("user", "Hi"), ("assistant", "a # b ## c")],
    ),
    ("chip2", {"text": "<human>: Hi\n<bot>: Hello.\n"}, HELLO),
    ("messages", {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]'}, HELLO),  # a CSV cell
    ("instances", {"instruction": "Greet.", "instances": [{"instruction_with_input": "Hi", "input": "x", "output": "Hello."}]}, HELLO),
    ("instances", {"instruction": "Hi", "instances": [{"input": "", "output": "Hello.", "constraints": "None."}]}, HELLO),
    ("text", {"text": "Just text.", "source": "web"}, [("text", "Just text.")]),
    ("hh-rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}, HELLO),
]


@pytest.mark.parametrize(("format", "row", "turns"), ROWS)
def test_a_row_of_each_format_says_exactly_its_turns(format: str, row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert detect(row) == format
    assert [(message.role, message.content) for message in to_messages(row, format)] == turns


def test_every_format_has_a_label_and_an_example_here() -> None:
    assert {format for format, _, _ in ROWS} == set(FORMATS)
    assert all(label and len(label) < 60 for label in FORMATS.values())


def chat(*turns: tuple[str, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "has no answer: 'output' is empty"),
        ({"instruction": "Hi", "output": None}, "has no answer: 'output' is empty"),
        ({"instruction": "Hi", "output": " \n"}, "has no answer: 'output' is empty"),
        ({"instruction": "", "input": None, "output": "x"}, "has no question: 'instruction' is empty"),
        ({"instruction": "Add", "input": "2, 2", "output": 4}, "'output' is 4, not text"),
        ({"prompt": ["Hi"], "completion": "x"}, "'prompt' is ['Hi'], not text"),
        ({"question": "Hi", "answer": float("nan")}, "'answer' is nan, not text"),
        (chat(), "has no turns: 'messages' is empty"),
        ({"messages": "..."}, "'messages' is '...', not a list of turns"),
        ({"messages": ["Hi"]}, "turn 1 is 'Hi', not a role with its content"),
        ({"messages": [{"content": "Hi"}]}, "turn 1 has no role"),
        (chat(("user", "Hi"), ("narrator", "Once")), "turn 2 has the unknown role 'narrator'"),
        (chat(("user", "Hi")), "ends with a user turn that has no answer"),
        (chat(*HELLO, ("user", "And?")), "ends with a user turn that has no answer"),
        (chat(*HELLO, ("tool", "4")), "ends with a tool turn that has no answer"),
        (chat(("system", "Be kind.")), "has no user turn"),
        (chat(("assistant", "Hello.")), "starts with an assistant turn"),
        (chat(("user", "Hi"), ("user", "Hi?"), ("assistant", "Hello.")), "turn 2 is a second user turn in a row"),
        (chat(*HELLO, ("system", "Be rude.")), "turn 3 (system) cannot follow an assistant turn"),
        (chat(("system", "Be kind."), ("assistant", "Hello.")), "turn 2 (assistant) cannot follow a system turn"),
        (chat(("user", "Hi"), ("assistant", "")), "turn 2 (assistant) is empty"),
        (chat(("user", "Hi"), ("assistant", None)), "turn 2 (assistant) is empty"),
        (chat(("user", 3), ("assistant", "Hello.")), "turn 1 (user) is 3, not text"),
        (chat(("user", [{"type": "image"}])), "turn 1 (user) is [{'type': 'image'}], not text"),
        (
            chat(("user", "Hi"), ("assistant", "\ud83d")),
            "turn 2 (assistant) holds half a character (a lone surrogate), which no tokenizer can read",
        ),
        ({"text": "### Human: Hi ### Assistant: Hello. ### Human:"}, "turn 3 (user) is empty"),
        ({"text": "### Human: Hi ### Assistant: Hello. ### Human: And?"}, "ends with a user turn that has no answer"),
        ({"text": "### Assistant: Hello."}, "starts with an assistant turn"),
        ({"text": " "}, "the text is empty"),
        ({"messages": "[broken"}, "'messages' is '[broken', not a list of turns"),
        ({"instruction": "Hi", "instances": []}, "has no turns: 'instances' is empty"),
        ({"instruction": "Hi", "instances": [{"output": "a"}, {"output": ""}]}, "instance 2 has no answer: 'output' is empty"),
        ({"instruction": "Hi", "instances": [5]}, "instance 1 is 5, not an input with its output"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], reason: str) -> None:
    format = detect(row)
    assert format is not None
    with pytest.raises(BadRow) as caught:
        to_messages(row, format)
    assert str(caught.value) == reason


def test_tool_calls_are_reported_and_not_lost_unseen() -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": 1}]}]}
    with pytest.raises(BadRow, match=r"turn 2 \(assistant\) has tool_calls, which would be lost"):
        to_messages(row, "messages")


@pytest.mark.parametrize(
    "row", [{}, {"foo": "a", "bar": "b"}, {"text": None}, {"text": 5}, {"chosen": [], "rejected": []}, {"instruction": "a"}]
)
def test_a_row_of_no_known_format_is_not_guessed_at(row: dict[str, Any]) -> None:
    assert detect(row) is None


def test_a_table_of_mixed_rows_is_told_by_what_is_filled() -> None:
    assert detect({"messages": None, "instruction": "Hi", "output": "Hello."}) == "alpaca"
    assert detect({"messages": [], "instruction": "", "prompt": "Hi", "completion": "Hello.", "output": ""}) == "prompt-completion"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "Say", "input": "", "output": "", "text": "Below is an instruction ... ### Response:"}, "alpaca"),  # as in Alpaca
        ({"instruction": None, "output": None, "question": "Who?", "answer": None, "text": "Who?"}, "question-answer"),
    ],
)
def test_a_question_without_an_answer_is_not_trained_on_as_the_text_beside_it(row: dict[str, Any], format: str) -> None:
    assert detect(row) == format
    with pytest.raises(EmptyAnswer):
        to_conversations(row, format)


def test_whitespace_of_a_turn_is_kept_where_the_format_has_columns_for_it() -> None:
    row = {"prompt": "  Hi\n", "completion": "\tHello. "}
    assert [message.content for message in to_messages(row, "prompt-completion")] == ["  Hi\n", "\tHello. "]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip() != "")


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.none() | words)
def test_any_conversation_comes_back_as_it_was_written(exchanges: list[tuple[str, str]], system: str | None) -> None:
    expected = [Message(role="system", content=system)] if system else []
    for question, answer in exchanges:
        expected += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    written = {"messages": [{"role": message.role, "content": message.content} for message in expected]}
    assert to_messages(written, "messages") == tuple(expected)
    shared = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(m.role, m.role), "value": m.content} for m in expected]}
    assert to_messages(shared, "sharegpt") == tuple(expected)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3),
    max_leaves=8,
)
columns = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "question",
        "answer",
        "system",
        "text",
        "chosen",
    ]
)


@given(st.dictionaries(columns, anything, max_size=4))
def test_whatever_a_row_holds_it_is_converted_or_explained(row: dict[str, Any]) -> None:
    format = detect(row)
    if format is None:
        return
    try:
        conversations = to_conversations(row, format)
    except BadRow as error:
        reason = str(error)
    else:
        reason = "none"
        assert all(messages[-1].role in ("assistant", "text") for messages in conversations)
        assert all(message.content.strip() for messages in conversations for message in messages)
    assert 0 < len(reason) < 200


@pytest.mark.parametrize("format", FORMATS)
@given(row=st.dictionaries(columns, anything, max_size=4))
def test_a_format_that_was_chosen_by_hand_converts_or_explains_any_row(format: str, row: dict[str, Any]) -> None:
    try:
        reason = "none" if to_conversations(row, format) else ""
    except BadRow as error:
        reason = str(error)
    assert 0 < len(reason) < 700


def test_a_chosen_format_names_the_column_that_is_missing_and_those_that_are_there() -> None:
    with pytest.raises(BadRow, match="has no column 'output'; columns: instruction, answer"):
        to_messages({"instruction": "Hi", "answer": "Hello."}, "alpaca")
    with pytest.raises(BadRow, match="has no column 'messages'; columns: text"):
        to_messages({"text": "Hi"}, "messages")
    with pytest.raises(BadRow, match="'text' has no marker of a turn in it"):
        to_messages({"text": "Hi"}, "guanaco")


def test_every_instance_is_a_conversation() -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1, 1", "output": "2"}, {"input": "2, 2", "output": "4"}]}
    assert [messages[0].content for messages in to_conversations(row, "instances")] == ["Add.\n\n1, 1", "Add.\n\n2, 2"]


@pytest.mark.parametrize(
    "row",
    [{"instruction": "Hi", "output": ""}, chat(("user", "Hi")), chat(("user", "Hi"), ("assistant", " "))],
)
def test_a_question_without_an_answer_is_told_from_other_faults(row: dict[str, Any]) -> None:
    with pytest.raises(EmptyAnswer):
        to_messages(row, detect(row) or "")


def test_columns_that_a_format_does_not_read_are_known() -> None:
    assert unused({"instruction": "Hi", "output": "Hello.", "history": [], "id": 3}, "alpaca") == ["history", "id"]
    assert unused({"chosen": "", "rejected": ""}, "hh-rlhf") == ["rejected"]


def test_a_format_that_is_none_is_refused_with_those_there_are() -> None:
    check("auto")
    with pytest.raises(UserError, match=r"There is no row format 'csv'\. Use auto or one of messages, sharegpt"):
        check("csv")
