"""Twenty people chat at once for five minutes, stop at random and leave at random: who waits how long, and does anybody hear
another's answer? `python -m tests.benchmarks chatters [--seconds N] [--seed N]`.

The real app over a tiny trained model; the people are simulated by what their pages send. Every question carries the mark of who asked.
Afterwards each is asked again, alone, of a model that remembers nothing: what was heard must be the beginning of that answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
from chatting import Heard, crowd, overtaken, squeezed
from serving import served

from qlora_ui.data.formats import Message
from qlora_ui.runs import Run, Workspace
from qlora_ui.ui.chat_turns import EMPTY, words

PEOPLE, TOKENS = 20, 32


def alone(run: Run) -> Any:
    """A model that remembers nothing, and asks what a person asked."""
    import torch

    from qlora_ui import speakers
    from qlora_ui.engine.chat import ChatModel
    from qlora_ui.engine.decoding import Sampling

    torch.set_num_threads(1)
    speaker = speakers.of_run(run)
    model = ChatModel(speaker, run.workspace.models, emit=lambda event: None, should_stop=lambda: False)

    def ask(one: Heard) -> list[str]:
        model.prefixes.forget()
        before = [Message(role=turn["role"], content=words(turn)) for turn in one.given["chat-tuned"]]  # an empty answer is nothing
        conversation = [*before, Message(role="user", content=one.given["chat-input"])]
        who = [speaker, speaker.base] if one.given["compare-switch"] else [speaker]
        sampling = Sampling(temperature=1.0, max_new_tokens=one.given["Max new tokens"], seed=one.given["Seed"])
        *_, last = model.reply([(side, conversation) for side in who], sampling)
        return list(last.texts)

    return ask


def mixed(run: Run, heard: list[Heard]) -> list[tuple[Heard, list[str]]]:
    """What somebody heard that was not the beginning of the answer to what they had asked."""
    ask = alone(run)
    asked = [(one, ask(one)) for one in heard if one.texts]
    return [
        (one, said)
        for one, said in asked
        if not all(squeezed(full or EMPTY).startswith(squeezed(part)) for part, full in zip(one.texts, said, strict=False))
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks chatters")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=20261125)
    flags = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    from training import trained

    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.open(home)
        tiny.tiny_model(workspace.models / tiny.NAME)
        run = trained(workspace, tiny.tiny_rows(Path(home) / "rows.json"), max_steps=8)
        with served(workspace.root, fresh=True) as app:
            asyncio.run(crowd(app, run.id, 1, 1, flags.seed))  # the model is loaded
            begun = time.perf_counter()
            heard = asyncio.run(crowd(app, run.id, PEOPLE, flags.seconds, flags.seed, TOKENS))
            report(heard, time.perf_counter() - begun)
        wrong = mixed(run, heard)
        print(f"asked again alone: {sum(bool(one.texts) for one in heard)}; mixed: {len(wrong)}")
        for one, said in wrong[:5]:
            print(f"  {one.given['chat-input']!r}: heard {one.texts!r}, alone {said!r}")


def report(heard: list[Heard], seconds: float) -> None:
    whole = [one for one in heard if one.ended and not one.asked_to_stop]
    waits = sorted(one.began - one.sent for one in heard if one.began)
    stopped = [one for one in heard if one.asked_to_stop and one.ended > one.asked_to_stop]
    honoured = sorted((one.ended - one.asked_to_stop) * 1000 for one in stopped if one.asked_to_stop)
    print(f"{PEOPLE} people, {seconds:.0f} s, {len(heard)} questions: {len(whole)} heard to the end, {len(stopped)} stopped, ", end="")
    print(f"{sum(one.left for one in heard)} left; {len(whole) / seconds:.2f} whole answers a second")
    print(f"wait for the first word: median {statistics.median(waits):.2f} s, 95 of 100 {waits[len(waits) * 95 // 100]:.2f} s, ", end="")
    print(f"longest {waits[-1]:.2f} s; longest from question to end {max(one.ended - one.sent for one in whole):.2f} s")
    print(f"Stop to the end: median {statistics.median(honoured):.0f} ms, longest {honoured[-1]:.0f} ms")
    told = [place for one in heard for place in one.places]
    print(f"places told: {len(told)}, the highest {max(told, default=0)}; overtaken: {len(overtaken(heard))}")
