"""What leaves a run: used by a process that knows nothing of this project, complete or absent, and refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
import training
from peft import PeftModel
from PIL import Image
from training import Watched, chat_model, never, silent

from qlora_ui import exports
from qlora_ui.cli import main
from qlora_ui.data.formats import Message
from qlora_ui.engine import export_merged
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.export import export
from qlora_ui.engine.logits import logits
from qlora_ui.engine.merge import dequantize, merge
from qlora_ui.engine.trained import find_base, load_trained
from qlora_ui.errors import UserError
from qlora_ui.events import Event, HeldOut, Log, Paused, Resumed, Step
from qlora_ui.exports import Kind
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

ASKED = "Question 3: which word is 3?"

ELSEWHERE = """
import importlib.util, json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)
bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)

def adapter(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"})
    return PeftModel.from_pretrained(model, folder), AutoTokenizer.from_pretrained(folder)

def merged(folder, base):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

def merged_t5(folder, base):
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

def script(folder, base):
    global chat
    spec = importlib.util.spec_from_file_location("chat", folder + "/chat.py")
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    return chat.load()

told = {}
for name, (how, folder, base) in json.loads(sys.argv[1]).items():
    model, tokenizer = globals()[how](folder, base)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # a kernel that rounds otherwise, on those CPUs that have it
    asked = [{"role": "user", "content": sys.argv[2]}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    more = {"decoder_input_ids": ids} if how == "merged_t5" else {}
    with torch.no_grad():
        logits = model.eval()(ids, **more).logits[0]
    told[name] = {"ids": ids[0].tolist(), "logits": logits.tolist()}
    if how == "script":
        told[name]["answer"] = chat.answer(model, tokenizer, asked, 24, 0.0)
    elif how == "merged":
        written = model.generate(ids, max_new_tokens=24, do_sample=False)
        told[name]["answer"] = tokenizer.decode(written[0, ids.shape[1]:], skip_special_tokens=True).strip()
print("@" + json.dumps({"told": told, "ours": [name for name in sys.modules if name.startswith("qlora_ui")]}))
"""


@dataclass
class Taken:
    """An export, what the command said of it, and what a process elsewhere made of it beside what the run's model says."""

    run: Run
    path: Path
    report: dict[str, Any]
    ids: list[int]
    logits: torch.Tensor
    answer: str
    trained: torch.Tensor
    trained_answer: str


def exported(run: Run, kind: str, to: Path, *more: str, capsys: Callable[[], str]) -> dict[str, Any]:
    assert main(["--home", str(run.workspace.root), "export", "--run", run.id, f"--{kind}", "--to", str(to), "--json", *more]) == 0
    report: dict[str, Any] = json.loads(capsys())
    return report


def said_by(run: Run, adapter: Path) -> tuple[torch.Tensor, str]:
    """Logits and greedy answer of the run's model to the question, as the chat computes them."""
    if adapter != run.adapter:
        run = Run(folder=Path(shutil.copytree(run.folder, run.workspace.runs / "20200101-000000-copy")))
        shutil.rmtree(run.adapter)
        shutil.copytree(run.folder / adapter.name, run.adapter)
    chat = chat_model(run)
    asked = [Message(role="user", content=ASKED)]
    text = chat.tokenizer.apply_chat_template([{"role": "user", "content": ASKED}], tokenize=False, add_generation_prompt=True)
    ids = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    more = {"decoder_input_ids": ids} if chat.model.config.is_encoder_decoder else {}
    with torch.no_grad():
        said: torch.Tensor = chat.model(ids, **more).logits[0]
    *_, last = chat.reply([(chat.speaker, asked)], Sampling(temperature=0, max_new_tokens=24))
    if run.id.endswith("copy"):
        shutil.rmtree(run.folder)
    return said, last.texts[0].strip()


@pytest.fixture(scope="module")
def taken(finished: Watched, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Taken]:
    """Every kind of export, all of them used by one process that was started elsewhere."""
    folder = tmp_path_factory.mktemp("exports")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    architectures.build(workspace.models / "t5", "t5")
    rows = tiny.tiny_rows(folder / "rows.json")
    plain = finished.run
    new = training.trained(workspace, rows, new_tokens="pad=<|fill|>, <|think|>", max_steps=2)
    t5 = training.trained(workspace, rows, model="t5", max_steps=2)
    wanted: dict[str, tuple[Run, str, list[str], str]] = {
        "adapter": (plain, "adapter", [], "adapter"),
        "zip": (plain, "adapter", ["--checkpoint", "6"], "adapter"),
        "merged": (plain, "merged", [], "merged"),
        "nf4": (plain, "merged", ["--quantize", "nf4"], "merged"),
        "folder": (plain, "folder", [], "script"),
        "new tokens": (new, "merged", [], "merged"),
        "t5": (t5, "merged", [], "merged_t5"),
    }
    reports, asked, trained = {}, {}, {}
    for name, (run, kind, more, how) in wanted.items():
        path = folder / "out" / (name + ".zip" if name == "zip" else name)
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            reports[name] = exported(run, kind, path, *more, capsys=output.getvalue)
        used = path
        if name == "zip":
            used = folder / "unzipped"
            zipfile.ZipFile(path).extractall(used)
        asked[name] = (how, str(used), str(run.workspace.models / tiny.NAME))
        trained[name] = said_by(run, run.folder / "checkpoint-6" if name == "zip" else run.adapter)
    command = [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(asked), ASKED]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    assert answer["ours"] == []
    return {
        name: Taken(
            run=wanted[name][0],
            path=Path(reports[name]["path"]),
            report=reports[name],
            ids=told["ids"],
            logits=torch.tensor(told["logits"]),
            answer=told.get("answer", ""),
            trained=trained[name][0],
            trained_answer=trained[name][1],
        )
        for name, told in answer["told"].items()
    }


# Elsewhere ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "zip", "folder"])
def test_an_adapter_elsewhere_says_exactly_what_the_run_says(taken: dict[str, Taken], name: str) -> None:
    assert torch.equal(taken[name].logits, taken[name].trained)
    assert taken[name].report["verification"]["largest_difference"] == 0


@pytest.mark.parametrize("name", ["merged", "new tokens", "t5"])
def test_a_merged_model_elsewhere_says_what_the_run_says_but_for_16_bits(taken: dict[str, Taken], name: str) -> None:
    made, proof = taken[name], taken[name].report["verification"]
    difference = float((made.logits - made.trained).abs().max())
    assert 0 < difference < proof["tolerance"]
    assert 0 < proof["largest_difference"] < proof["tolerance"]
    assert proof["largest_difference"] < proof["adapter_effect"] / 3  # it is not the base
    assert (proof["made_of"], proof["device"]) == ("what was trained", "cpu")
    weights = list(made.path.glob("*.safetensors"))
    assert [weight.name for weight in weights] == ["model.safetensors"]
    assert json.loads((made.path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["merged", "new tokens", "t5"])
def test_the_merge_itself_loses_nothing(taken: dict[str, Taken], name: str) -> None:
    run = taken[name].run
    trained = load_trained(run, run.adapter, find_base(run, silent, never), silent, never)
    said = trained.reference()
    model = PeftModel.from_pretrained(dequantize(trained.model.unload(), silent, never), run.adapter)
    assert torch.equal(logits(model, said.ids), said.logits)
    assert torch.allclose(logits(merge(model, torch.float32, silent, never), said.ids), said.logits, atol=1e-3)


def test_a_model_quantized_again_is_what_it_was_quantized_to_and_says_how_far_that_is(taken: dict[str, Taken]) -> None:
    made, proof = taken["nf4"], taken["nf4"].report["verification"]
    assert proof["largest_difference"] <= proof["tolerance"]
    assert proof["made_of"] == "its form quantized again"
    assert 0 < proof["divergence"] < proof["divergence_without_adapter"] / 2  # of what was learned, most is left
    settings = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert (settings["bnb_4bit_quant_type"], settings["quant_method"]) == ("nf4", "bitsandbytes")
    assert made.report["bytes"] < taken["merged"].report["bytes"]


def test_the_script_and_the_merged_model_answer_as_the_run_does_and_end_where_it_ends(taken: dict[str, Taken]) -> None:
    assert taken["folder"].answer == taken["folder"].trained_answer != ""
    assert taken["merged"].answer[:20] == taken["merged"].trained_answer[:20] != ""
    generation = json.loads((taken["new tokens"].path / "generation_config.json").read_text())
    tokenizer = chat_model(taken["new tokens"].run)
    assert generation["eos_token_id"] == tokenizer.end_ids
    assert generation["pad_token_id"] == tokenizer.tokenizer.convert_tokens_to_ids("<|fill|>")


def test_new_tokens_are_rows_of_the_merged_model(taken: dict[str, Taken]) -> None:
    config = json.loads((taken["new tokens"].path / "config.json").read_text())
    assert config["vocab_size"] == len(tiny.tiny_tokenizer()) + 2


def test_the_template_of_a_merged_model_is_plain_jinja_that_renders_the_same(taken: dict[str, Taken]) -> None:
    assert "{% generation %}" in (taken["adapter"].path / "chat_template.jinja").read_text()
    assert "generation %}" not in (taken["merged"].path / "chat_template.jinja").read_text()
    assert taken["merged"].ids == taken["adapter"].ids
    marked = "a {%- generation -%} b {%- endgeneration %} c{% if add_generation_prompt %}d{% endif %}"
    assert export_merged.plain_template(marked) == "a {%- if true -%} b {%- endif %} c{% if add_generation_prompt %}d{% endif %}"


def test_an_export_holds_no_pickle_and_nothing_of_trainers(taken: dict[str, Taken]) -> None:
    for made in taken.values():
        names = zipfile.ZipFile(made.path).namelist() if made.path.suffix else [path.name for path in made.path.rglob("*")]
        assert not [
            name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")) or name in ("trainer_state.json", "complete.json")
        ]
        assert {"tokenizer.json", "chat_template.jinja", "README.md"} <= {Path(name).name for name in names}
    assert list(taken["adapter"].path.parent.glob(".*")) == []


def test_the_card_tells_of_the_weights_that_were_exported_and_shows_their_losses(taken: dict[str, Taken]) -> None:
    text = (taken["merged"].path / "README.md").read_text("utf-8")
    for said in ("QLoRA fine-tune of `tiny`", "merged into the dequantized base", "convert_hf_to_gguf.py", "![", "at step 8"):
        assert said in text
    assert Image.open(taken["merged"].path / "loss.png").size == (960, 480)
    with zipfile.ZipFile(taken["zip"].path) as archive:
        assert "at step 6" in archive.read("README.md").decode()
    assert "--base FOLDER" in (taken["folder"].path / "README.md").read_text("utf-8")
    assert "GGUF" not in (taken["nf4"].path / "README.md").read_text("utf-8")


# Which weights ------------------------------------------------------------------------------------------------------------


def copied(finished: Watched, workspace: Workspace) -> Run:
    """The finished run in another workspace, to do things to."""
    return Run(folder=Path(shutil.copytree(finished.run.folder, workspace.runs / finished.run.id)))


def test_a_paused_run_gives_its_newest_complete_checkpoint_and_says_so(finished: Watched, workspace: Workspace) -> None:
    run = copied(finished, workspace)
    run.append(Resumed(step=6, checkpoint="checkpoint-6"))
    run.append(Paused(step=7, total_steps=8))
    (run.folder / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"torn")
    weights = exports.weights_of(run)
    assert (weights.folder.name, weights.step) == ("checkpoint-6", 6)
    assert weights.why == f"{run.id} is paused, so its newest complete checkpoint is exported: step 6"


def test_steps_that_were_undone_or_came_later_are_not_told_of(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json")
    for event in (
        HeldOut(step=0, loss=3.0),
        HeldOut(step=4, loss=9.0),
        Resumed(step=2),
        HeldOut(step=4, loss=2.0),
        HeldOut(step=6, loss=1.0),
    ):
        run.append(event)
    told = exports.events_behind(exports.Weights(folder=run.folder, step=4, why=""), run)
    assert [(event.step, event.loss) for event in told if isinstance(event, (HeldOut, Step))] == [(0, 3.0), (4, 2.0)]


def refused(run: Run, kind: Kind = "adapter", to: str | Path = "out", **wish: Any) -> str:
    with pytest.raises(UserError) as caught:
        exports.plan(run, kind, str(to), **wish)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_one_sentence(
    finished: Watched, tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = finished.run, tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert "exists already, and nothing is overwritten" in refused(run, to=full)
    assert "exists already, and nothing is overwritten" in refused(run, to=full / "mine.txt")
    assert "lies among the runs" in refused(run, to=run.folder / "out")
    assert "cannot be written to" in refused(run, to="x" * 300)
    assert "mine.txt is a file, so that nothing can lie in it" in refused(run, to=full / "mine.txt" / "out")
    assert "only an adapter that is not pushed can be one file" in refused(run, "merged", "out.zip")
    assert "only an adapter that is not pushed can be one file" in refused(run, "merged", "out.ZIP")
    assert "The place to export to is empty." in refused(run, to=" ")
    for name in ("guanaco", "me/gua naco", "me/gua/naco", "me/", "-"):
        assert refused(run, repository=name) == f"The repository is {name!r}, which is no name on the Hub. Write it as owner/name."
    assert "--quantize is for --merged" in refused(run, quantize=True)
    assert "has no checkpoint of step 7. Checkpoints: 6, 8." in refused(run, checkpoint=7)
    assert (full / "mine.txt").read_text() == "mine"
    damaged = copied(finished, workspace)
    (damaged.folder / "checkpoint-6" / "adapter_config.json").unlink()
    assert "checkpoint-6 of" in refused(damaged, checkpoint=6)
    assert "adapter_config.json is missing. Choose another." in refused(damaged, checkpoint=6)
    empty = tiny.tiny_run(workspace, "rows.json")
    assert f"{empty.id} is training. Pause or stop it" in refused(empty)
    empty.append(Paused(step=0, total_steps=4))
    assert f"{empty.id} has no adapter yet." in refused(empty)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is read-only. Make it writable, then export again." in refused(run)


def test_an_unknown_run_exits_2_before_anything_is_loaded(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--run", "20261122-100139-nope", "--merged", "--to", "out"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "There is no run '20261122-100139-nope'" in err
    with pytest.raises(SystemExit):
        main(["export", "--run", "x", "--to", "out"])


# Complete or absent -------------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_told_with_both_figures_and_nothing_is_left(
    finished: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = exports.plan(finished.run, "merged", str(tmp_path / "out" / "merged"), quantize=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1_050_000))
    with pytest.raises(UserError, match=r"The merged needs 1\.4 MB while it is made, but the disk of \S+ has 1\.1 MB free\."):
        export(wish, silent, never)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["Base: ", "Merging", "Writing", "Quantizing", "Verifying"])
def test_a_cancelled_export_leaves_nothing(finished: Watched, tmp_path: Path, moment: str) -> None:
    wish = exports.plan(finished.run, "merged", str(tmp_path / "out" / "merged"), quantize=True)
    told: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Log):
            told.append(event.text)

    with pytest.raises(Cancelled):
        export(wish, emit, lambda: any(text.startswith(moment) for text in told))
    assert told[-1].startswith(moment)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_command_with_130_and_nothing_is_left(
    finished: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return merge(*arguments)

    monkeypatch.setattr(export_merged, "merge", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    home = str(finished.run.workspace.root)
    assert main(["--home", home, "export", "--run", finished.run.id, "--merged", "--to", str(tmp_path / "out")]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().err.endswith(f"Cancelled: nothing was written to {tmp_path / 'out'}.\n")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_merge_that_forgets_the_adapter_is_found_and_not_kept(finished: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_merged, "merge", lambda model, dtype, *_: model.unload().to(dtype))
    with pytest.raises(UserError, match="What was written differs from what was trained: reloaded, its logits differ by up to"):
        export(exports.plan(finished.run, "merged", str(tmp_path / "out")), silent, never)
    assert list(tmp_path.iterdir()) == []
