"""How fast are answers drawn, and how soon does the first word come? Ours against plain `generate()` on the same NF4 model.

Each contender answers at its turn, on one core, and CPU seconds are counted, so that other work on the machine changes little.
Drawing is timed from the first token to the last. The first token is timed apart, at the first and the sixth turn of one
conversation, whose answers are given so that all read the same. Give the workspace with the starter model in QLORA_UI_HOME.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_ui import presets, speakers
from qlora_ui.data.formats import Message
from qlora_ui.jobs import Jobs
from qlora_ui.runs import ENV, Run, Workspace

CACHED = Path(__file__).resolve().parents[1] / ".cache"
ROUNDS, TOKENS = 2, 16
QUESTION = "Write a long story about a shepherd who loses a llama in the mountains and finds it again in an unexpected place."
SAID = (
    "That is a good question. Llamas graze on high meadows, they drink little, they carry up to thirty kilograms over long ways, and "
    "they warn the herd with a high call when something comes near. Shepherds keep them together with sheep for that reason, and shear "
    "them once in two years. Their wool is fine and without grease, so that it can be spun as it is, and ropes are made of the rest. "
)
ASKED = "Thank you. Now tell me more about how a shepherd looks after them in winter, what they eat then, and where they sleep at night."


Contender = Callable[[Sequence[Message], int], list[float]]
"""Answers a conversation with so many tokens, and returns the moments of the beginning and of each token."""


def conversation(turns: int) -> list[Message]:
    """So many questions, and the answers to all but the last."""
    said = [Message(role="user", content=QUESTION)]
    for _ in range(turns - 1):
        said += [Message(role="assistant", content=SAID), Message(role="user", content=ASKED)]
    return said


class Plain:
    """What `transformers` and `bitsandbytes` do by themselves, with the adapter in PEFT or without.

    `rounds`: bitsandbytes may use the products that it has for some CPUs, which round float32 to bfloat16.
    """

    def __init__(self, folder: Path, dtype: Any, adapter: Path | None, rounds: bool = True) -> None:
        from bitsandbytes.nn import Linear4bit
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        self.tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=dtype).eval()
        for layer in self.model.modules():
            if isinstance(layer, Linear4bit) and not rounds:
                layer.support_avx512bf16_for_cpu = False
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def __call__(self, messages: Sequence[Message], tokens: int) -> list[float]:
        """The moments of the beginning and of each token."""
        from transformers.generation.streamers import BaseStreamer

        at = list[float]()

        class Watch(BaseStreamer):
            def put(self, value: Any) -> None:
                at.append(time.process_time())

            def end(self) -> None:
                pass

        begun = time.process_time()
        turns = [{"role": message.role, "content": message.content} for message in messages]
        asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        self.model.generate(**asked, streamer=Watch(), do_sample=False, max_new_tokens=tokens)
        return [begun, *at[1:]]  # the streamer is given the prompt first


class Ours:
    """One side or both of a chat, as the page has them."""

    def __init__(self, model: Any, *who: Any, remembers: bool = True, faster: bool = False) -> None:
        self._model, self._who, self._remembers, self._faster = model, who, remembers, faster

    def __call__(self, messages: Sequence[Message], tokens: int) -> list[float]:
        from qlora_ui.engine.decoding import Sampling

        if not self._remembers or len(messages) == 1:
            self._model.prefixes.forget()
        self._model.faster.switch(self._faster)
        at = [time.process_time()]
        for _ in self._model.reply([(who, messages) for who in self._who], Sampling(temperature=0, max_new_tokens=tokens)):
            at.append(time.process_time())
        return at


def pace(at: Sequence[float]) -> float:
    """Tokens a CPU second after the first, of one row."""
    return (len(at) - 2) / (at[-1] - at[1])


def contenders(run: Run, compute_dtype: str) -> dict[str, Contender]:
    """Plain ones, and ours as they are offered."""
    import dataclasses

    from qlora_ui.engine.chat import ChatModel
    from qlora_ui.engine.hardware import detect, torch_dtype
    from qlora_ui.engine.model import find_here

    speaker = speakers.of_run(run)
    speaker = dataclasses.replace(speaker, quantization=dataclasses.replace(speaker.quantization, compute_dtype=compute_dtype))
    hardware = detect(compute_dtype)
    model = ChatModel(speaker, run.workspace.models, emit=lambda event: None, should_stop=lambda: False)
    found = find_here(speaker.model, "main", run.workspace.models)
    assert found is not None
    gain = f"faster takes {model.faster.gib:.2f} GiB" if model.faster.gib else "faster is not offered: this CPU has products for 4 bits"
    print(f"computing in {hardware.compute_dtype} ({hardware.reason}); {gain}", flush=True)
    listed: dict[str, Contender] = {
        "plain generate, base": Plain(found.folder, torch_dtype(hardware), None),
        "ours, base": Ours(model, speaker.base),
        "plain generate, adapter in PEFT": Plain(found.folder, torch_dtype(hardware), run.adapter),
        "ours, tuned": Ours(model, speaker),
        "ours, both at once (each)": Ours(model, speaker, speaker.base),
    }
    if hardware.compute_dtype == "float32":
        listed["plain generate, base, all in float32"] = Plain(found.folder, torch_dtype(hardware), None, rounds=False)
        listed["plain generate, adapter in PEFT, all in float32"] = Plain(found.folder, torch_dtype(hardware), run.adapter, rounds=False)
    if model.faster.gib:
        listed |= {"ours, base, faster": Ours(model, speaker.base, faster=True), "ours, tuned, faster": Ours(model, speaker, faster=True)}
    first: dict[str, Contender] = {
        "plain generate, adapter in PEFT": listed["plain generate, adapter in PEFT"],
        "ours, nothing kept": Ours(model, speaker, remembers=False),
    }
    first["ours"] = Ours(model, speaker)
    return listed | {f"first token: {name}": one for name, one in first.items()}


def race(run: Run, compute_dtype: str) -> None:
    listed = contenders(run, compute_dtype)
    drawn = {name: one for name, one in listed.items() if not name.startswith("first")}
    paces: dict[str, list[float]] = {name: [] for name in drawn}
    for _ in range(ROUNDS + 1):
        for name, one in drawn.items():
            paces[name].append(pace(one(conversation(1), TOKENS)))
    print("\n| contender | tokens/s of one core, median | least | most |\n|---|---|---|---|")
    for name, measured in paces.items():
        timed = measured[1:]  # the first pays for memory that is asked for once
        print(f"| {name} | {statistics.median(timed):.1f} | {min(timed):.1f} | {max(timed):.1f} |", flush=True)
    if compute_dtype != "auto":
        return
    print("\n| CPU seconds to the first token | turn 1 | turn 6 | of the turns 2 to 6, the longest |\n|---|---|---|---|")
    for name, one in listed.items():
        if name.startswith("first"):
            rounds = [[(at := one(conversation(turn), 2))[1] - at[0] for turn in range(1, 7)] for _ in range(ROUNDS + 1)]
            medians = [statistics.median(turn) for turn in zip(*rounds[1:], strict=True)]
            print(f"| {name.removeprefix('first token: ')} | {medians[0]:.3f} | {medians[5]:.3f} | {max(medians[1:]):.3f} |", flush=True)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    home = Path(os.environ.get(ENV, CACHED)).resolve()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.open(folder)
        workspace.models.rmdir()
        workspace.models.symlink_to(home / "models")
        short = {"max_steps": 1, "held_out_share": 0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "sample_every": 0}
        run = Jobs(workspace).run_here(presets.load("starter").config.with_values(short))
        for compute_dtype in ("auto", "float32"):
            race(run, compute_dtype)
