"""Models that come with Python code: it runs when the owner said so, and never because a page did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from training import chat_model

from qlora_ui import jobs, presets
from qlora_ui.config import RunConfig
from qlora_ui.data.formats import Message
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, Log
from qlora_ui.inspection import Inspector
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Run, Workspace
from qlora_ui.services import Services, WarmUp, build

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own-code"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(workspace: Workspace, tmp_path: Path) -> Path:
    """A model with code of its own, called `own`; the file is there when that code has run."""
    marker = tmp_path / "has-run"
    folder = tiny.tiny_model(workspace.models / "own")
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-code",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return marker


def trained(workspace: Workspace, rows: Path, **values: object) -> Run:
    run = tiny.tiny_run(workspace, rows, model="own", max_steps=1, **values)
    jobs.execute(run, train)
    return run


def test_code_is_not_run_unasked_and_the_remedy_is_told(workspace: Workspace, rows: Path, marker: Path) -> None:
    last = tiny.events_of(trained(workspace, rows))[-1]
    assert isinstance(last, Failed)
    assert not last.traceback
    assert "needs Python code of its own" in last.message
    assert "--set trust_remote_code=true" in last.message
    assert not marker.exists()


def test_code_runs_where_the_owner_allows_it_and_the_log_says_so(workspace: Workspace, rows: Path, marker: Path) -> None:
    run = trained(workspace, rows, trust_remote_code=True)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    assert marker.exists()
    assert any("trust_remote_code is on" in event.text for event in tiny.events_of(run, Log) if event.level == "warning")

    def silent(event: Event) -> None:
        pass

    model = chat_model(run)
    answers = list(model.reply([(model.speaker, [Message(role="user", content="Hi")])], Sampling(max_new_tokens=3)))
    assert answers[-1].tokens > 0


def test_looking_at_a_data_set_never_runs_code(workspace: Workspace, rows: Path, marker: Path) -> None:
    config = tiny.tiny_config(rows, model="own", trust_remote_code=True)
    *_, seen = Inspector(workspace, within=None).look(config)
    assert "needs Python code of its own" in seen.no_tokens
    assert not marker.exists()


# From a page ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def services(workspace: Workspace) -> Services:
    """The services over jobs that do nothing."""
    made = build(workspace, WarmUp())
    return dataclasses.replace(made, jobs=Jobs(workspace, lambda run, emit, should_stop, checkpoint: None))


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns this machine wrote a preset that trusts the model `own`."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "trusting.yaml").write_text("title: T\nabout: T.\nsettings: {model: own, trust_remote_code: true}\n")
    (folder / "plain.yaml").write_text("title: P\nabout: P.\nsettings: {model: own}\n")
    load, names = presets.load, presets.names
    monkeypatch.setattr(presets, "load", lambda name: load(name, folder))
    monkeypatch.setattr(presets, "names", lambda _folder=None: names(folder))


def from_page(preset: str, **values: object) -> RunConfig:
    return RunConfig(preset=preset).with_values({"data": "bundled:guanaco-starter", "trust_remote_code": True, **values})


@pytest.mark.parametrize(
    "config",
    [
        from_page("", model="own"),
        from_page("plain", model="own"),
        from_page("no-such", model="own"),
        from_page("trusting", model="o/other"),
        from_page("trusting", model="own", revision="other"),
    ],
    ids=["no preset", "a preset without trust", "no such preset", "another model", "another revision"],
)
def test_a_page_may_not_switch_it_on(services: Services, owner: None, config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"a page may not let .* run its own code") as caught:
        services.start(config)
    assert caught.value.field == "trust_remote_code"
    assert services.workspace.all() == []


def test_a_page_may_start_what_the_owners_preset_allows(services: Services, owner: None) -> None:
    run = services.start(from_page("trusting", model="own"))
    services.workspace.lease().acquire(timeout=20).lock.release()
    assert run.config().model.trust_remote_code
