"""How the page's events are wired, read off what Gradio sends to the browser."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from qlora_ui import services
from qlora_ui.runs import Workspace
from qlora_ui.ui import app


@pytest.fixture
def config(workspace: Workspace) -> dict[str, Any]:
    return app.build(services.build(workspace, services.WarmUp())).config


def test_a_listener_that_wants_the_last_word_has_its_event_for_itself(config: dict[str, Any]) -> None:
    """Gradio repeats an event for all its listeners when one with `always_last` was busy: two would call each other for ever."""
    states = {part["id"] for part in config["components"] if part["type"] == "state"}  # whose changes call each listener by itself
    listeners = defaultdict(list)
    for dependency in config["dependencies"]:
        for component, event in dependency["targets"]:
            if component is not None and component not in states:
                listeners[component, event].append(dependency["trigger_mode"])
    assert len(listeners) > 50
    assert {event: modes for event, modes in listeners.items() if "always_last" in modes and len(modes) > 1} == {}


def test_what_follows_an_event_that_may_run_twice_at_a_time_is_never_left_out(config: dict[str, Any]) -> None:
    """Gradio leaves out a listener that is still busy: the page would go on showing what it found after the first of them."""
    modes = {dependency["id"]: dependency["trigger_mode"] for dependency in config["dependencies"]}
    following = [d["trigger_mode"] for d in config["dependencies"] if modes.get(d["trigger_after"]) == "multiple"]
    assert following
    assert "once" not in following
