"""What a training leaves on disk, and that the adapter works where this app is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file
from training import Watched, built

from qlora_ui.data import checks
from qlora_ui.engine import tokens
from qlora_ui.events import AdapterSaved, Finished, Phase, Planned

COMPLETE = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_a_checkpoint_is_complete_when_it_is_reported_and_only_the_newest_are_kept(finished: Watched) -> None:
    assert list(finished.at_checkpoint) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [name for name, files in finished.at_checkpoint.items() if not files >= COMPLETE] == []
    assert finished.checkpoints_there == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
        ["checkpoint-6", "checkpoint-8"],
    ]
    assert [folder.name for folder in finished.run.checkpoints()] == ["checkpoint-6", "checkpoint-8"]
    for folder in finished.run.checkpoints():
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == int(folder.name.split("-")[1])


def test_the_last_checkpoint_is_the_adapter(finished: Watched) -> None:
    last, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (finished.run.checkpoints()[-1], finished.run.adapter))
    assert all(torch.equal(last[name], adapter[name]) for name in adapter | last)


def test_the_run_folder_holds_what_a_person_needs_to_know_of_it(finished: Watched) -> None:
    run = finished.run
    assert isinstance(tiny.events_of(run)[-1], Finished)
    assert [event.step for event in tiny.events_of(run, AdapterSaved)] == [8]
    assert [event.name for event in tiny.events_of(run, Phase)] == [
        "reading",
        "fetching",
        "loading",
        "tokenizing",
        "quantizing",
        "training",
        "saving",
    ]
    assert run.facts()["model_origin"] == "already in the workspace"
    assert run.facts()["data_fingerprint"] == checks.load(run.folder / "data").report.fingerprint
    planned = tiny.events_of(run, Planned)[0]
    assert (planned.train_rows, planned.held_out_rows, planned.total_steps) == (10, 2, 8)
    assert 0 < planned.trained_tokens < planned.tokens
    template = (run.adapter / "chat_template.jinja").read_text()
    assert template == tokens.TEMPLATES["chatml"]
    assert not list(run.folder.glob("*.partial"))


ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
adapter = sys.argv[1]
model = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(adapter)
turns = [{"role": "user", "content": "Question 1: which word is 1?"}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
with torch.no_grad():
    untuned = base(ids).logits[0, -1]
    tuned = PeftModel.from_pretrained(base, adapter).eval()(ids).logits[0, -1]
print(json.dumps({"ids": ids[0].tolist(), "difference": (tuned - untuned).abs().max().item(),
                  "ours": [name for name in sys.modules if name.startswith("qlora_ui")]}))
"""


def test_the_adapter_loads_in_plain_peft_where_this_app_is_not(finished: Watched, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(finished.run.adapter)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ours"] == []
    assert told["difference"] > 0.1
    tokenizer = built(finished.run).tokenizer
    asked = "<|im_start|>user\nQuestion 1: which word is 1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(told["ids"]) == asked
