"""How the page's events are wired, read off what Gradio sends to the browser."""

from __future__ import annotations

from collections import defaultdict

from qlora_ui import services
from qlora_ui.runs import Workspace
from qlora_ui.ui import app


def test_a_listener_that_wants_the_last_word_has_its_event_for_itself(workspace: Workspace) -> None:
    """Gradio repeats an event for all its listeners when one with `always_last` was busy: two would call each other for ever."""
    config = app.build(services.build(workspace, services.WarmUp())).config
    states = {part["id"] for part in config["components"] if part["type"] == "state"}  # whose changes call each listener by itself
    listeners = defaultdict(list)
    for dependency in config["dependencies"]:
        for component, event in dependency["targets"]:
            if component is not None and component not in states:
                listeners[component, event].append(dependency["trigger_mode"])
    assert len(listeners) > 50
    assert {event: modes for event, modes in listeners.items() if "always_last" in modes and len(modes) > 1} == {}
