"""Who can be talked to, told by names and configs: every one is found again by its id, and nothing outside the workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_ui import checkpoints, labels, speakers
from qlora_ui.errors import UserError
from qlora_ui.runs import Run, Workspace


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base", **config}))
    return folder


def checkpoint(run: Run, step: int) -> None:
    checkpoints.seal(adapter(run.folder / f"checkpoint-{step}"))


def test_each_is_found_again_by_its_id_and_so_is_its_base(workspace: Workspace) -> None:
    (workspace.models / "owner--base").mkdir()
    (workspace.models / "owner--base" / "config.json").write_text("{}")
    adapter(workspace.root / "adapters" / "someone--theirs")
    run = tiny.tiny_run(workspace, "rows.json", quant_bits="8")
    adapter(run.adapter)
    checkpoint(run, 20)
    checkpoint(run, 40)
    adapter(run.folder / "checkpoint-60")  # never sealed
    found = speakers.all_of(workspace)
    assert [speaker.id for speaker in found] == [
        run.id,
        f"{run.id}/checkpoint-40",
        f"{run.id}/checkpoint-20",
        "adapter:someone--theirs",
        "model:owner/base",
    ]
    assert len({speaker.name for speaker in found}) == 5
    for speaker in found:
        assert speakers.find(workspace, speaker.id) == speaker
        assert speakers.find(workspace, speaker.base.id) == speaker.base == speaker.base.base
        assert speaker.base.adapter is None
        assert (speaker.base.model, speaker.base.quantization) == (speaker.model, speaker.quantization)
        assert (speaker.base.vocabulary, speaker.base.prompt_format) == (speaker.vocabulary, speaker.prompt_format)
    assert found[0].quantization.quant_bits == "8"
    assert "in 8 bits" in found[0].about
    assert (found[3].quantization.quant_type, found[3].quantization.double_quant) == ("nf4", True)


def test_a_run_speaks_on_the_very_base_that_it_was_trained_on_under_its_title(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json", trust_remote_code=True)
    adapter(run.adapter)
    run.note(model_commit="c0ffee")
    labels.save(run, labels.Label(title="My best"))
    speaker = speakers.of_run(run)
    assert (speaker.revision, speaker.trust_remote_code, speaker.vocabulary) == ("c0ffee", True, run.adapter)
    assert speaker.name == f"My best ({run.id})"


def test_a_foreign_adapter_is_never_trusted_and_keeps_its_own_words_where_it_brings_some(workspace: Workspace) -> None:
    folder = workspace.root / "adapters"
    adapter(folder / "mine", revision="abc")
    adapter(folder / "owner--guanaco-7b")
    (adapter(folder / "owner--guanaco-8b") / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "owner--guanaco-8b" / "tokenizer.json").touch()
    mine, seven, eight = (speakers.of_adapter(workspace, path.name) for path in sorted(folder.iterdir()))
    assert (mine.model, mine.revision, mine.trust_remote_code) == ("owner/base", "abc", False)
    assert (mine.prompt_format, seven.prompt_format, eight.prompt_format) == ("tokenizer", "guanaco", "tokenizer")
    assert (mine.vocabulary, eight.vocabulary) == (None, folder / "owner--guanaco-8b")
    assert "Guanaco's" in seven.about


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("20200101-000000-gone", "There is no run"),
        ("20200101-000000-gone/checkpoint-2", "There is no run"),
        ("../../etc", "There is no run '..'"),
        ("", "There is no run ''"),
        ("adapter:../runs", "There is no adapter '../runs'"),
        ("adapter:", "There is no adapter ''"),
        ("adapter:gone", "There is no adapter 'gone'"),
        ("base-of:adapter:gone", "There is no adapter 'gone'"),
        ("model:/", "outside the workspace"),
        ("model:", "outside the workspace"),
        ("model:\0", ""),
    ],
)
def test_what_is_not_there_or_elsewhere_is_refused_with_its_name(workspace: Workspace, wish: str, said: str) -> None:
    if wish == "model:\0":
        assert speakers.find(workspace, wish).model == "\0"  # no path; the engine says that there is no such model
        return
    with pytest.raises(UserError) as caught:
        speakers.find(workspace, wish)
    assert said in str(caught.value)


def test_a_run_without_an_adapter_and_a_checkpoint_that_is_gone_are_refused(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json")
    with pytest.raises(UserError, match=f"{run.id} has no adapter yet") as caught:
        speakers.find(workspace, run.id)
    assert caught.value.field == "run"
    with pytest.raises(UserError, match="has no complete checkpoint of step 7"):
        speakers.find(workspace, f"{run.id}/checkpoint-7")
    with pytest.raises(UserError, match="checkpoint-STEP"):
        speakers.find(workspace, f"{run.id}/data")


def test_what_cannot_be_read_is_not_listed(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json")
    adapter(run.adapter)
    run.config_path.write_text("{")
    for content in ("{", "[]", "{}"):
        (adapter(workspace.root / "adapters" / f"broken{len(content)}{content[-1] == ']'}") / "adapter_config.json").write_text(content)
    (workspace.root / "adapters" / "file").touch()
    assert speakers.all_of(workspace) == []
