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

from qlora_ui.config import DataConfig
from qlora_ui.data import checks, sources
from qlora_ui.data.checks import Conversation, DataSet, Dropped, Report, dropped_rows, load, write
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


def prepare(reference: str, **options: Any) -> DataSet:
    """The data set with settings as they are when nobody changes any."""
    limits = {name: options.pop(name) for name in ("should_stop", "limit", "within") if name in options}
    return checks.prepare(DataConfig(data=reference, **options), **limits)


def split(conversations: list[Conversation], share: float, seed: int, rows: int = 0) -> tuple[tuple[Conversation, ...], ...]:
    report = Report.from_dict({**REPORT, "kept": len(conversations)})
    data = DataSet(conversations=tuple(conversations), report=report)
    return checks.split(data, DataConfig(held_out_share=share, held_out_rows=rows), seed)


REPORT: dict[str, Any] = {
    "source": "a.jsonl",
    "format": "messages",
    "formats": {"messages": 1},
    "read": 1,
    "kept": 1,
    "conversations": 1,
    "dropped": [],
    "duplicates": 0,
    "empty_answers": 0,
    "scripts": {"Latin": 1},
    "unused_columns": [],
    "fingerprint": "",
    "held_out_split": "",
    "held_out_rows": 0,
    "held_out_dropped": [],
}


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
        "Choose the format and map its columns, or bring conversations as messages."
    )


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv", "prompt,completion\n")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} has no rows"):
        prepare(str(tmp_path / name))


def test_more_rows_than_can_be_explained_one_by_one_end_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_DROPPED", 2)
    assert len(prepare(save(tmp_path, "a.jsonl", [pair("Q"), {}, {}])).report.dropped) == 2
    with pytest.raises(UserError, match=r"^Row 2 of a.jsonl: no known format; columns: none. More than 2 rows cannot be used. Choose the"):
        prepare(save(tmp_path, "a.jsonl", [pair("Q"), {}, {}, {}]))


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


def test_a_number_of_rows_can_be_held_out_instead_of_a_share() -> None:
    conversations = [conversation(row, str(row)) for row in range(1, 51)]
    train, held_out = split(conversations, 0.5, 42, rows=7)
    assert (len(train), len(held_out)) == (43, 7)
    with pytest.raises(UserError, match="held_out_rows is 50, but there are 50 rows: hold out fewer") as caught:
        split(conversations, 0.5, 42, rows=50)
    assert caught.value.field == "held_out_rows"


def test_the_sources_own_split_is_held_out_and_its_copies_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    splits = {"o/set": [pair("a"), pair("b"), pair("c", "")], "o/set#test": [pair("b"), pair("d"), pair("e", "")]}

    def read(reference: str, *_: Any) -> Any:
        return (sources.RawRow(number=number, values=row) for number, row in enumerate(splits[reference], 1))

    monkeypatch.setattr(sources, "read", read)
    data = prepare("o/set", held_out_split="test")
    train, held_out = checks.split(data, DataConfig(), 42)
    assert [kept.messages[0].content for kept in train] == ["a"]
    assert [kept.messages[0].content for kept in held_out] == ["b", "d"]
    assert data.report.dropped[0] == Dropped(row=2, reason="is also in the split 'test', which is held out")
    assert (data.report.read, data.report.kept, len(data.report.dropped)) == (3, 1, 2)
    assert (data.report.held_out_split, data.report.held_out_rows, len(data.report.held_out_dropped)) == ("test", 2, 1)
    write(data, tmp_path / "data")
    assert load(tmp_path / "data") == data
    splits["o/set"] = [pair("b")]
    with pytest.raises(UserError, match="Every row is also in the split 'test'"):
        prepare("o/set", held_out_split="test")


def test_a_file_has_no_split_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl has no split 'test': only Hugging Face sets have") as caught:
        prepare(save(tmp_path, "a.jsonl", [pair("a")]), held_out_split="test")
    assert caught.value.field == "held_out_split"


def test_a_wrong_guess_is_corrected_by_format_and_mapping(tmp_path: Path) -> None:
    reference = save(tmp_path, "odd.jsonl", [{"ask": "Hi", "reply": "Hello.", "id": 7}] * 2)
    with pytest.raises(UserError, match="no known format; columns: ask, reply, id"):
        prepare(reference)
    data = prepare(reference, data_format="alpaca", columns="instruction=ask, output=reply")
    assert (data.report.format, data.report.kept, data.report.unused_columns) == ("alpaca", 2, ("id",))
    assert prepare(reference, columns="instruction=ask, output=reply").report == data.report
    with pytest.raises(UserError, match="There is no row format 'json'"):
        prepare(reference, data_format="json")


def test_mixed_rows_are_counted_by_format_and_script(tmp_path: Path) -> None:
    rows = [pair("a"), {"instruction": "b", "output": "да"}, {"text": "### Human: Hi ### Assistant: Hello."}, {"text": "plain"}, pair("c")]
    report = prepare(save(tmp_path, "mixed.jsonl", rows)).report
    assert report.formats == {"prompt-completion": 2, "alpaca": 1, "guanaco": 1, "text": 1}
    assert report.scripts == {"Latin": 4, "Cyrillic": 1}


def test_a_row_of_several_conversations_is_one_kept_row(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "instances": [{"input": "1, 1", "output": "2"}, {"input": "2, 2", "output": "4"}]}]
    report = prepare(save(tmp_path, "instances.jsonl", rows)).report
    assert (report.read, report.kept, report.conversations) == (1, 1, 2)


def test_answers_that_are_missing_are_counted(tmp_path: Path) -> None:
    report = prepare(save(tmp_path, "a.jsonl", [pair("a"), pair("b", ""), {"foo": 1}])).report
    assert (len(report.dropped), report.empty_answers) == (2, 1)


def test_dropped_rows_can_be_taken_away_as_they_are(tmp_path: Path) -> None:
    reference = save(tmp_path, "a.jsonl", [pair("a"), pair("b", ""), 7])
    data = DataConfig(data=reference)
    assert list(dropped_rows(data, checks.prepare(data).report.dropped)) == [
        {"row": 2, "reason": "has no answer: 'completion' is empty", "values": pair("b", "")},
        {"row": 3, "reason": "line 3 is 7, not an object with named columns", "values": None},
    ]


def test_a_sample_is_the_first_rows(tmp_path: Path) -> None:
    reference = save(tmp_path, "a.jsonl", [pair(str(number)) for number in range(20)])
    assert [row.messages[0].content for row in prepare(reference, limit=3).conversations] == ["0", "1", "2"]


@settings(deadline=None)
@given(rows=st.permutations([pair("a"), pair("b"), {"instruction": "c", "output": "d"}, {"question": "e", "answer": "f"}, {"text": "g"}]))
def test_what_is_detected_does_not_depend_on_the_order_of_rows(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = prepare(save(Path(folder), "a.jsonl", rows)).report
    assert list(report.formats.items()) == [("prompt-completion", 2), ("alpaca", 1), ("question-answer", 1), ("text", 1)]


def test_what_comes_out_cannot_be_changed(tmp_path: Path) -> None:
    data = prepare(save(tmp_path, "a.jsonl", [pair("a")]))
    assert isinstance(data, DataSet)
    with pytest.raises(AttributeError):
        data.report.kept = 7  # type: ignore[misc]
