"""The account of a data set: what was kept, what was dropped and why, what is held out, what is written."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui.data.checks import Conversation, DataSet, Dropped, Report, load, prepare, split, write
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def real(name: str) -> str:
    if not (REAL / name).is_file():
        pytest.skip(f"the shared test data {REAL / name} is not on this machine")
    return str(REAL / name)


def save(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def pair(question: str, answer: str = "Yes.") -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def conversation(row: int, question: str) -> Conversation:
    return Conversation(row=row, messages=(Message(role="user", content=question), Message(role="assistant", content="Yes.")))


def test_every_row_is_kept_or_explained(tmp_path: Path) -> None:
    rows = [pair("a"), pair("b", ""), {"foo": 1, "bar": 2}, {"instruction": "c", "output": "d"}, 7, pair("a"), pair("a")]
    data = prepare(save(tmp_path, "mixed.jsonl", rows))
    assert data.report.summary() == "7 rows: 4 kept, 3 dropped, 2 duplicates"
    assert data.report.format == "prompt-completion"
    assert [conversation.row for conversation in data.conversations] == [1, 4, 6, 7]
    assert data.report.dropped == (
        Dropped(row=2, reason="has no answer: 'completion' is empty"),
        Dropped(row=3, reason="no known format; columns: foo, bar"),
        Dropped(row=5, reason="line 5 is 7, not an object with named columns"),
    )


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("alpaca_1k.json", "alpaca", 999),
        ("oasst1_guanaco_test.jsonl", "guanaco", 953),
        ("mmlu_zero_shot_val.jsonl", "prompt-completion", 1531),
    ],
)
def test_real_sets_are_kept_whole(name: str, format: str, expected: int) -> None:
    data = prepare(real(name))
    assert (data.report.format, data.report.read, data.report.kept, data.report.dropped) == (format, expected, expected, ())


def test_real_alpaca_rows_say_what_the_file_says() -> None:
    reference = real("alpaca_1k.json")
    rows = json.loads(Path(reference).read_text("utf-8"))
    data = prepare(reference)
    for row, kept in zip(rows, data.conversations, strict=True):
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert [message.content for message in kept.messages] == [question, row["output"]]
    assert data.report.duplicates == len(rows) - len({json.dumps(row) for row in rows})


def test_real_guanaco_rows_lose_nothing_but_markers_and_spaces() -> None:
    reference = real("oasst1_guanaco_test.jsonl")
    texts = [json.loads(line)["text"] for line in Path(reference).read_text("utf-8").split("\n") if line]
    for text, kept in zip(texts, prepare(reference).conversations, strict=True):
        markers = {"user": "### Human:", "assistant": "### Assistant:"}
        again = "".join(markers[message.role] + message.content for message in kept.messages)
        assert "".join(again.split()) == "".join(text.split())


def test_nothing_kept_is_one_message_with_row_reason_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(save(tmp_path, "answers.json", [{"foo": 1, "bar": 2}, {"foo": 3}]))
    assert caught.value.field == "data"
    assert str(caught.value) == (
        "Row 1 of answers.json: no known format; columns: foo, bar. None of the 2 rows can be used. "
        "Rename the columns to instruction and output (or prompt and completion), or bring conversations as messages."
    )


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv", "prompt,completion\n")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} has no rows"):
        prepare(str(tmp_path / name))


def test_column_names_of_a_strange_row_cannot_break_the_report(tmp_path: Path) -> None:
    rows = [{"\ud800": 1, **{f"column {number}" * 20: 1 for number in range(50)}}, pair("a")]
    data = prepare(save(tmp_path, "strange.json", rows))
    reason = data.report.dropped[0].reason
    assert reason.startswith("no known format; columns: \\ud800, column 0")
    assert len(reason) < 600
    reason.encode()


def test_stop_ends_the_preparation(tmp_path: Path) -> None:
    reference = save(tmp_path, "a.jsonl", [pair(str(number)) for number in range(100)])
    asked: list[bool] = []

    def stop_at_the_tenth() -> bool:
        asked.append(True)
        return len(asked) > 10

    with pytest.raises(Cancelled):
        prepare(reference, should_stop=stop_at_the_tenth)
    assert len(asked) == 11


def test_the_fingerprint_follows_what_is_said_and_not_the_file(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[Any]) -> str:
        return prepare(save(tmp_path, name, rows)).report.fingerprint

    first = fingerprint("a.jsonl", [pair("a"), pair("b")])
    assert fingerprint("b.json", [{"instruction": "a", "output": "Yes."}, 5, pair("b")]) == first
    assert fingerprint("c.jsonl", [pair("b"), pair("a")]) != first
    assert fingerprint("d.jsonl", [pair("a"), pair("b", "No.")]) != first


text = st.text(max_size=12)
rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": text, "completion": text}),
        st.fixed_dictionaries({"instruction": text, "output": st.none() | text}),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        st.integers(),
    ),
    max_size=12,
)


@settings(deadline=None)  # files on a busy machine
@given(rows, st.sampled_from(["rows.json", "rows.jsonl"]))
def test_kept_and_dropped_are_all_and_the_written_set_loads_the_same(rows: list[Any], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = prepare(save(Path(folder), name, [pair("always kept"), *rows]))
        except UserError as error:
            pytest.fail(str(error))
        numbers = [conversation.row for conversation in data.conversations] + [dropped.row for dropped in data.report.dropped]
        assert sorted(numbers) == list(range(1, data.report.read + 1))
        assert data.report.read == len(rows) + 1
        assert data.report.kept == len(data.conversations)
        distinct = len({conversation.messages for conversation in data.conversations})
        assert data.report.duplicates == data.report.kept - distinct
        assert Report.from_dict(json.loads(json.dumps(data.report.to_dict()))) == data.report
        write(data, Path(folder) / "data")
        assert load(Path(folder) / "data") == data


def test_written_rows_are_a_data_set_of_their_own(tmp_path: Path) -> None:
    data = prepare(save(tmp_path, "a.jsonl", [pair("one\u2028line\r\n"), pair("b")]))
    write(data, tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["report.json", "rows.jsonl"]
    again = prepare(str(tmp_path / "data" / "rows.jsonl"))
    assert (again.conversations, again.report.format) == (data.conversations, "messages")


def test_missing_torn_or_changed_rows_are_not_loaded(tmp_path: Path) -> None:
    data = prepare(save(tmp_path, "a.jsonl", [pair("a"), pair("b")]))
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "data")
    write(data, tmp_path / "data")
    whole = (tmp_path / "data" / "rows.jsonl").read_bytes()
    (tmp_path / "data" / "rows.jsonl").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "data")
    (tmp_path / "data" / "rows.jsonl").write_bytes(whole.replace(b"Yes", b"No!"))
    with pytest.raises(UserError, match="were changed"):
        load(tmp_path / "data")


@given(questions=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=60), share=st.floats(0, 0.5), seed=st.integers(0, 2**31 - 1))
def test_a_split_is_complete_disjoint_and_never_leaves_training_empty(questions: list[str], share: float, seed: int) -> None:
    conversations = [conversation(row, question) for row, question in enumerate(questions, 1)]
    train, held_out = split(conversations, share, seed)
    assert split(conversations, share, seed) == (train, held_out)
    assert train
    assert list(train) == sorted(train, key=lambda kept: kept.row)
    assert sorted([*train, *held_out], key=lambda kept: kept.row) == conversations
    assert {kept.messages for kept in train}.isdisjoint(kept.messages for kept in held_out)
    assert bool(held_out) == (share > 0 and len(set(questions)) > 1)
    largest = max(Counter(questions).values())
    assert len(held_out) <= max(1, round(share * len(questions)), largest)


def test_the_held_out_share_is_met_and_follows_the_seed() -> None:
    conversations = [conversation(row, str(row)) for row in range(1, 201)]
    train, held_out = split(conversations, 0.05, 42)
    assert (len(train), len(held_out)) == (190, 10)
    assert split(conversations, 0.05, 43)[1] != held_out


def test_what_comes_out_cannot_be_changed(tmp_path: Path) -> None:
    data = prepare(save(tmp_path, "a.jsonl", [pair("a")]))
    assert isinstance(data, DataSet)
    with pytest.raises(AttributeError):
        data.report.kept = 7  # type: ignore[misc]
