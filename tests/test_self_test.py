"""An adapter that is put on is looked at: it changes something, and its base stays what it was, or that is said."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import Watched, logged, never, trained

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.engine import chat
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.decoding import Sampling
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.runs import Run, Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.talking import EngineChat

ASKED = [Message(role="user", content="Question 3: which word is 3?")]
GREEDY = Sampling(temperature=0, max_new_tokens=4)


def loaded(run: Run, speaker: Speaker | None = None) -> tuple[ChatModel, list[str]]:
    """The model, and what was warned of."""
    events: list[Event] = []
    model = ChatModel(speaker or speakers.of_run(run), run.workspace.models, events.append, never)
    return model, [event.text for event in events if isinstance(event, Log) and event.level == "warning"]


def changed(speaker: Speaker, folder: Path, change: Any) -> Speaker:
    """The speaker with an adapter whose tensors were changed."""
    shutil.copytree(speaker.adapter or folder, folder)
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return dataclasses.replace(speaker, adapter=folder, vocabulary=folder)


def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if "lora_B" in name else tensor


@pytest.mark.parametrize(
    "values",
    [{}, {"lora_bias": "all"}, {"modules_to_save": "lm_head"}, {"new_tokens": "<|a|>, <|b|>"}, {"use_dora": True}],
    ids=lambda values: next(iter(values), "plain"),
)
def test_every_kind_of_adapter_passes(tmp_path: Path, rows: Path, values: dict[str, Any]) -> None:
    workspace = Workspace.open(tmp_path / "home")
    tiny.tiny_model_with_biases(workspace.models / tiny.NAME)
    run = trained(workspace, rows, **{"max_steps": 2, "eval_steps": 100, "save_steps": 100, **values})
    assert run.state() == "finished", logged(run, "error")
    assert loaded(run)[1] == []


def test_an_adapter_that_changes_nothing_is_told_in_the_answer(finished: Watched, tmp_path: Path) -> None:
    speaker = changed(speakers.of_run(finished.run), tmp_path / "adapter", zeroed)
    *_, answers = EngineChat(finished.run.workspace).reply([(speaker, ASKED), (speaker.base, ASKED)], GREEDY)
    assert answers.note == f"{speaker.name} changes nothing: this adapter answers exactly as its base does."
    assert answers.texts[0] == answers.texts[1]


def test_an_adapter_that_learned_new_tokens_only_changes_something(tmp_path: Path, rows: Path, tiny_workspace: Workspace) -> None:
    run = trained(tiny_workspace, rows, max_steps=2, eval_steps=100, save_steps=100, new_tokens="<|a|>")
    assert loaded(run, changed(speakers.of_run(run), tmp_path / "adapter", zeroed))[1] == []


def test_an_adapter_of_numbers_that_are_none_is_told(finished: Watched, tmp_path: Path) -> None:
    speaker = changed(speakers.of_run(finished.run), tmp_path / "adapter", lambda name, tensor: tensor * torch.nan)
    (said,) = loaded(finished.run, speaker)[1]
    assert said == f"The numbers of {speaker.name} are not finite, so what it says means nothing. Choose an earlier checkpoint."


def test_a_base_that_an_adapter_changed_is_refused_aloud(finished: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when trained biases stay on, or PEFT merged the adapter."""
    real = chat.load_adapter

    def spoiling(base: Any, *args: Any) -> Any:
        with torch.no_grad():
            base.get_input_embeddings().weight[5:60] += 0.5
        return real(base, *args)

    monkeypatch.setattr(chat, "load_adapter", spoiling)
    with pytest.raises(UserError, match=r"the base no longer answers as it did without: its logits differ by up to \d") as raised:
        loaded(finished.run)
    assert "cannot be compared" in str(raised.value)


def test_biases_that_stay_on_the_base_are_found(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.open(tmp_path / "home")
    tiny.tiny_model_with_biases(workspace.models / tiny.NAME)
    run = trained(workspace, rows, max_steps=4, eval_steps=100, save_steps=100, lora_bias="all")

    def forget_biases(model: ChatModel, *args: Any) -> None:
        model._base_biases = []
        real(model, *args)

    real = ChatModel.add
    monkeypatch.setattr(ChatModel, "add", forget_biases)
    with pytest.raises(UserError, match="the base no longer answers"):
        loaded(run)
