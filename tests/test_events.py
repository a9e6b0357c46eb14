"""Run events and their one-line form: a closed set, and a file with anything else in it still reads."""

from __future__ import annotations

import json
import math
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.events import KINDS, Event, Log, Step, decode, encode, finite

floats = st.floats(allow_nan=False, allow_infinity=False)


def events_of(kind: type[Event], text: st.SearchStrategy[str]) -> st.SearchStrategy[Event]:
    """Any event of a kind whose texts are such."""
    changes = st.dictionaries(text, st.lists(st.integers() | floats | text | st.booleans(), min_size=2, max_size=2), max_size=3)
    by_type = {str: text, float: floats, float | None: st.none() | floats, dict[str, list[Any]]: changes}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in ("kind", "state")}
    return st.builds(kind, **{name: by_type.get(hint, st.from_type(hint)) for name, hint in hints.items()})


any_event = st.one_of([events_of(kind, st.text()) for kind in KINDS.values()])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text() | st.sampled_from(sorted(KINDS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("kind"), inner, max_size=3),
)


def test_every_kind_of_event_is_in_the_closed_set() -> None:
    assert set(KINDS.values()) == set(Event.__subclasses__())
    assert all(kind.kind == name for name, kind in KINDS.items())


@given(any_event)
def test_an_event_comes_back_from_its_line(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["kind"] == event.kind
    assert decode(line) == event


@given(any_event, st.data())
def test_a_torn_line_is_no_event(event: Event, data: st.DataObject) -> None:
    line = encode(event)
    assert decode(line[: data.draw(st.integers(0, len(line) - 1))]) is None


@given(st.text() | any_json.map(json.dumps))
def test_any_other_line_is_skipped_and_never_an_error(line: str) -> None:
    assert isinstance(decode(line), Event | None)


@given(any_event, st.text().filter(lambda kind: kind not in KINDS))
def test_a_kind_or_a_field_of_a_later_version_is_skipped(event: Event, kind: str) -> None:
    fields: dict[str, Any] = json.loads(encode(event))
    assert decode(json.dumps({**fields, "kind": kind})) is None
    assert decode(json.dumps({**fields, "a_field_of_next_year": 1})) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_no_word_for_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode(Step(step=1, loss=value, learning_rate=0, grad_norm=0, tokens_per_second=0, memory_gib=0, epoch=0))
    assert finite(value) is None
    assert finite(0.5) == 0.5


def test_an_event_has_the_time_it_was_made() -> None:
    assert Log(text="a").time <= Log(text="b").time
    assert get_type_hints(Log)["time"] is float
