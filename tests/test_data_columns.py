"""Column mapping: any column can be read as any field, and what is written down comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.data.columns import choices, parse, rename, write
from qlora_ui.data.formats import FIELDS, BadRow, detect, to_conversations
from qlora_ui.errors import UserError

fields = st.sampled_from(sorted({field for known in FIELDS.values() for field in known}))
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(str.strip)


@given(st.dictionaries(fields, names, max_size=4))
def test_a_mapping_comes_back_as_it_was_written(mapping: dict[str, str]) -> None:
    assert parse(write(mapping)) == mapping


def test_a_mapping_is_read_as_a_person_writes_it() -> None:
    assert parse('instruction = question, "output=answer, long"\nsystem=') == {
        "instruction": "question",
        "output": "answer, long",
        "system": "",
    }


@pytest.mark.parametrize("text", ["question", "instruct=question", "=question", "instruction=a, b"])
def test_a_mapping_that_is_none_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="is not field=column, with a field of messages, role") as caught:
        parse(text)
    assert caught.value.field == "columns"


def said(row: dict[str, object], mapping: str, format: str = "") -> list[tuple[str, str]]:
    renamed = rename(row, parse(mapping))
    return [(message.role, message.content) for message in to_conversations(renamed, format or detect(renamed) or "")[0]]


def test_columns_of_any_name_are_read_through_the_mapping() -> None:
    row: dict[str, object] = {"ask": "Hi", "reply": "Hello.", "note": "x"}
    assert detect(row) is None
    assert said(row, "instruction=ask, output=reply") == [("user", "Hi"), ("assistant", "Hello.")]
    assert said(row, "prompt=ask, completion=reply, system=note")[0] == ("system", "x")


def test_a_wrong_guess_is_put_right_by_swapping_the_columns() -> None:
    assert said({"question": "Hello.", "answer": "Hi"}, "question=answer, answer=question") == [("user", "Hi"), ("assistant", "Hello.")]


def test_a_column_can_be_left_unread() -> None:
    row: dict[str, object] = {"instruction": "Hi", "input": "secret", "output": "Hello."}
    assert said(row, "input=") == [("user", "Hi"), ("assistant", "Hello.")]


def test_a_column_without_a_name_is_not_read_in_place_of_none() -> None:
    row: dict[str, object] = {"": "0", "instruction": "Hi", "output": "Hello."}
    assert said(row, "input=") == [("user", "Hi"), ("assistant", "Hello.")]


def test_blanks_around_a_columns_name_do_not_keep_it_from_being_mapped() -> None:
    row: dict[str, object] = {" ask": "Hi", "reply ": "Hello."}
    assert choices([row], "instruction") == ["ask", "reply"]
    assert said(row, "instruction=ask, output=reply") == [("user", "Hi"), ("assistant", "Hello.")]


def test_keys_of_turns_are_mapped_too() -> None:
    row: dict[str, object] = {"dialogue": [{"speaker": "human", "said": "Hi"}, {"speaker": "bot", "said": "Hello."}]}
    assert said(row, "messages=dialogue, role=speaker, content=said") == [("user", "Hi"), ("assistant", "Hello.")]
    assert choices([row], "role") == ["speaker", "said"]
    assert choices([row], "messages") == ["dialogue"]


def test_a_mapped_column_that_a_row_lacks_is_that_rows_reason() -> None:
    with pytest.raises(BadRow, match="has no column 'ask', which instruction is mapped to; columns: foo"):
        rename({"foo": 1}, {"instruction": "ask"})
