"""The event log on disk: whatever was torn, unknown or written at once by many, every reader sees each event once and in order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_events import any_event, events_of

from qlora_ui.events import KINDS, Event, Interrupted, Log, Phase, Step, encode
from qlora_ui.runs import Run, Workspace, encodable

# As names of files that are not UTF-8 have it: only low surrogates. A high one before a low one is the same JSON as the
# character that the two are elsewhere.
any_text = st.text(st.characters().filter(lambda character: not 0xD800 <= ord(character) < 0xDC00))
any_event_with_any_text = st.one_of([events_of(kind, any_text) for kind in KINDS.values()])
of_a_later_version = st.sampled_from(
    [b"", b'{"kind": "of next year"}', b"not json", b'{"kind": "log"}', b"[1]", b"\xff\xfe\x00", "\x85 \u2028".encode(), b"\r", b"[" * 9000]
)
Line = tuple[bytes, list[Event]]
"""A line of a log, and the event in it, if there is one."""


def line_of(event: Event) -> Line:
    return encodable(encode(event)), [event]


logs = st.lists(any_event.map(line_of) | of_a_later_version.map(lambda line: (line, [])), max_size=6)


def content_of(lines: list[Line]) -> bytes:
    return b"".join(line + b"\n" for line, _ in lines)


def events_in(lines: list[Line]) -> list[Event]:
    return [event for _, events in lines for event in events]


def log(factory: pytest.TempPathFactory, content: bytes) -> Run:
    """A folder with that log."""
    run = Run(folder=factory.mktemp("run"))
    run.events_path.write_bytes(content)
    return run


@given(any_event_with_any_text)
def test_any_event_with_any_text_comes_back_from_disk(tmp_path_factory: pytest.TempPathFactory, event: Event) -> None:
    run = log(tmp_path_factory, b"")
    run.append(event)
    assert run.read() == ([event], run.size())
    assert run.events_path.read_bytes().count(b"\n") == 1


@given(logs, any_event, st.data())
def test_a_log_cut_at_any_byte_keeps_what_was_whole_and_goes_on_with_a_line_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Line], event: Event, data: st.DataObject
) -> None:
    content = content_of(lines)
    cut = data.draw(st.integers(0, len(content)))
    run = log(tmp_path_factory, content[:cut])
    whole = content[:cut].count(b"\n")
    before, offset = run.read()
    assert before == events_in(lines[:whole])
    run.append(event)
    assert run.read()[0] == [*before, event]
    assert run.read(offset) == ([event], run.size())


@given(logs, st.data())
def test_readers_see_each_event_once_and_in_order_wherever_the_file_ends_when_they_look(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Line], data: st.DataObject
) -> None:
    content = content_of(lines)
    run = log(tmp_path_factory, b"")
    readers: list[tuple[list[Event], int]] = [([], 0) for _ in range(3)]
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6))), len(content)]:
        run.events_path.write_bytes(content[:end])
        for who in data.draw(st.sets(st.integers(0, 2))) if end < len(content) else range(3):
            seen, offset = readers[who]
            more, after = run.read(offset)
            assert offset <= after <= end
            readers[who] = ([*seen, *more], after)
            assert readers[who][0] == events_in(lines)[: len(seen) + len(more)]
    assert [reader for reader in readers if reader != (events_in(lines), len(content))] == []


@given(logs, st.data())
def test_who_begins_in_the_middle_of_a_line_sees_all_lines_after_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Line], data: st.DataObject
) -> None:
    content = content_of(lines)
    start = data.draw(st.integers(0, len(content)))
    begun = content[:start].count(b"\n") + (start > 0 and content[start - 1 : start] != b"\n")
    assert log(tmp_path_factory, content).read(start) == (events_in(lines[begun:]), len(content))


@pytest.fixture
def run(workspace: Workspace) -> Run:
    """A run with two steps done, whose process is gone."""
    run = tiny.tiny_run(workspace, "rows.json")
    run.append(Phase(name="training"))
    for number in (1, 2):
        run.append(Step(step=number, loss=1.0, learning_rate=0.1, grad_norm=None, tokens_per_second=1.0, memory_gib=1.0, epoch=0.1))
    return run


@pytest.mark.parametrize("lost", [1, 2, 90])
def test_a_run_whose_last_line_was_torn_is_interrupted_at_the_last_step_that_anybody_can_see(
    workspace: Workspace, run: Run, lost: int
) -> None:
    with run.events_path.open("rb+") as file:
        file.truncate(run.size() - lost)
    assert workspace.settle() == [run]
    assert [event.step for event in tiny.events_of(run, Step, Interrupted)] == [1, 1]
    assert run.state() == "interrupted"


def test_the_lines_of_several_writers_do_not_mix(run: Run) -> None:
    def write(writer: int) -> None:
        for number in range(50):
            run.append(Log(text=f"{writer} {number} " + "x" * 500))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for writer in writers:
        writer.start()
    texts, offset = [], 0
    while any(writer.is_alive() for writer in writers):
        events, offset = run.read(offset)
        texts += [event.text for event in events if isinstance(event, Log)]
    texts += [event.text for event in run.read(offset)[0] if isinstance(event, Log)]
    assert len(texts) == len(set(texts)) == 150
    for writer in range(3):
        assert [text.split()[1] for text in texts if text.startswith(f"{writer} ")] == [str(number) for number in range(50)]


@pytest.mark.parametrize("text", ["a\nb\r\nc", "\u2028\x85\x0b", "Grüße, 你好 🦙", "lone \udcff surrogate", "\0"])
def test_any_text_comes_back_from_the_folder(workspace: Workspace, text: str) -> None:
    run = tiny.tiny_run(workspace, f"{text}.json")
    run.append(Log(text=text))
    run.note(about=text)
    assert [event.text for event in tiny.events_of(run, Log)] == [text]
    assert run.config().data.data == f"{text}.json".strip()
    assert run.facts()["about"] == text


def test_a_line_that_ends_a_torn_one_is_written_once(tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    run.events_path.write_bytes(b'{"kind": "st')
    for text in ("a", "b"):
        run.append(Log(text=text, time=0.0))
    assert run.events_path.read_bytes().splitlines()[0] == b'{"kind": "st (torn)'
    assert [event.text for event in tiny.events_of(run, Log)] == ["a", "b"]
    assert run.events_path.read_bytes().count(b"\n") == 3
