"""Adapters from a zip or the Hub: brought whole or refused in a sentence, without a file outside their folder."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_hub_models import CLOSED, Hub, hub, use  # noqa: F401 - a fixture

from qlora_ui import adapters, speakers
from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "init_lora_weights": True, "revision": "abc"}


def packed(path: Path, files: Mapping[str, bytes | str] | None = None, config: Mapping[str, Any] = CONFIG, at: str = "") -> Path:
    """A zip with an adapter, in a folder of it, and more files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{at}adapter_config.json", json.dumps(config))
        archive.writestr(f"{at}adapter_model.safetensors", b"weights")
        for name, content in (files or {}).items():
            archive.writestr(name, content)
    return path


def left(workspace: Workspace) -> list[str]:
    return sorted(path.relative_to(workspace.root).as_posix() for path in (workspace.root / "adapters").rglob("*"))


@pytest.mark.parametrize("at", ["", "some/folder/"])
def test_a_zip_becomes_a_speaker_with_what_it_needs_and_no_more(workspace: Workspace, tmp_path: Path, at: str) -> None:
    more = {f"{at}tokenizer.json": "{}", f"{at}README.md": "# Mine", f"{at}optimizer.pt": "pickle", f"{at}runs/x.txt": "", "code.py": ""}
    speaker = adapters.from_zip(packed(tmp_path / "My adapter.zip", more, at=at), workspace)
    assert speaker.name.startswith("My-adapter-")
    assert speaker.adapter is not None
    assert {path.name for path in speaker.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert (speaker.model, speaker.revision) == ("owner/base", "abc")
    assert speakers.all_of(workspace) == [speaker]
    assert adapters.from_zip(tmp_path / "My adapter.zip", workspace) == speaker  # once more is no other
    assert speakers.all_of(workspace) == [speaker]


def link(archive: Path) -> None:
    member = zipfile.ZipInfo("tokenizer.json")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(member, "/etc/passwd")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"../outside.json": "x"}, "holds '../outside.json', which leads out of its folder"),
        ({"a/../../outside.json": "x"}, "leads out of its folder"),
        ({"/tokenizer.json": "x"}, "leads out of its folder"),
        ({"..\\tokenizer.json": "x"}, "leads out of its folder"),
        ({"C:tokenizer.json": "x"}, "leads out of its folder"),
        ({"tokenizer.json": b"0" * 60_000_000}, "would become 60.0 MB in 3 files"),
        ({f"{number}.txt": "" for number in range(1_000)}, "in 1,002 files"),
        ({"other/adapter_config.json": "{}"}, "holds 2 files named adapter_config.json, and not one"),
    ],
    ids=["up", "up from a folder", "absolute", "backslash", "drive", "bomb", "swarm", "two"],
)
def test_a_zip_that_is_no_honest_one_is_refused_and_leaves_nothing(
    workspace: Workspace, tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        adapters.from_zip(packed(tmp_path / "bad.zip", files), workspace)
    assert said in str(caught.value)
    assert left(workspace) == []
    assert not list(tmp_path.rglob("outside.json"))


def test_a_zip_with_a_link_a_torn_one_and_one_that_is_none_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.zip")
    link(archive)
    with pytest.raises(UserError, match="is a link"):
        adapters.from_zip(archive, workspace)
    whole = packed(tmp_path / "b.zip", {"tokenizer.json": "0123456789" * 99}).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no zip", whole.replace(whole[60:70], b"0123456789", 1)):
        (tmp_path / "b.zip").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.zip cannot be unpacked"):
            adapters.from_zip(tmp_path / "b.zip", workspace)
    assert left(workspace) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "It is of the kind IA3, and only LoRA can be used"),
        ({"init_lora_weights": "pissa_niter_16"}, "It started as pissa_niter_16 and belongs to another base"),
        ({"base_model_name_or_path": "/home/them/llama"}, "names its base model '/home/them/llama', which is not in"),
        ({"base_model_name_or_path": "~/llama"}, "names its base model '~/llama', which is not in"),
        ({"base_model_name_or_path": None}, "names its base model 'None', which is not in"),
    ],
)
def test_what_is_no_plain_lora_or_names_no_base_is_refused(workspace: Workspace, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        adapters.from_zip(packed(tmp_path / "a.zip", config={**CONFIG, **config}), workspace)
    assert said in str(caught.value)
    assert left(workspace) == []


def test_the_base_may_be_said_and_one_of_another_machine_is_found_by_its_last_name(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = packed(tmp_path / "a.zip", config={**CONFIG, "base_model_name_or_path": "/home/them/models/tiny"})
    said = adapters.from_zip(elsewhere, workspace, base=" huggyllama/llama-7b ")
    assert (said.model, said.revision) == ("huggyllama/llama-7b", "main")
    (workspace.models / "tiny").mkdir()
    (workspace.models / "tiny" / "config.json").write_text("{}")
    assert adapters.from_zip(elsewhere, workspace).model == "tiny"


def test_other_formats_than_safetensors_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("adapter_config.json", json.dumps(CONFIG))
        archive.writestr("adapter_model.bin", "pickle")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors, and other formats can run code"):
        adapters.from_zip(tmp_path / "a.zip", workspace)


def test_an_adapter_of_the_hub_is_fetched_by_its_name_and_revision(
    workspace: Workspace,
    tmp_path: Path,
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in {"adapter_config.json": json.dumps(CONFIG), "adapter_model.safetensors": "weights", "evil.py": "boom"}.items():
        (theirs / name).write_text(content)
    hub.models["timdettmers/guanaco-7b"] = theirs
    speaker = adapters.from_hub("timdettmers/guanaco-7b", workspace, lambda event: None, lambda: False)
    assert (speaker.id, speaker.name, speaker.model) == ("adapter:timdettmers--guanaco-7b", "timdettmers/guanaco-7b", "owner/base")
    assert speaker.prompt_format == "guanaco"
    assert speaker.adapter is not None
    assert {path.name for path in speaker.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    at_commit = adapters.from_hub(f" timdettmers/guanaco-7b@{'a' * 40} ", workspace, lambda event: None, lambda: False)
    assert speakers.find(workspace, at_commit.id) == at_commit != speaker
    (theirs / "adapter_config.json").write_text(json.dumps({**CONFIG, "peft_type": "IA3"}))
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    hub.models["o/pickled"] = theirs
    for wish, said in {
        "o/pickled": "It is of the kind IA3",
        "o/gone": "The Hub has no adapter 'o/gone'",
        "no name": "The Hub has no adapter 'no name'",
    }.items():
        with pytest.raises(UserError, match=said):
            adapters.from_hub(wish, workspace, lambda event: None, lambda: False)
    use(monkeypatch, CLOSED)
    with pytest.raises(UserError, match="o/other could not be fetched: the Hugging Face Hub cannot be reached"):
        adapters.from_hub("o/other", workspace, lambda event: None, lambda: False)
    assert len(speakers.all_of(workspace)) == 2


def test_a_path_where_no_adapter_is_is_told_and_not_looked_for_on_the_hub(workspace: Workspace, tmp_path: Path) -> None:
    exported = tmp_path / "exported" / "adapter"
    exported.mkdir(parents=True)
    (exported / "adapter_config.json").write_text("{}")
    for wish, said in ((tmp_path / "nope.zip", "no zip of one."), (exported.parent, f"no zip of one: choose {exported}.")):
        with pytest.raises(UserError, match=said):
            adapters.named(str(wish), workspace, lambda event: None, lambda: False)
