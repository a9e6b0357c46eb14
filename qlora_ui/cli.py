"""The same engine without a browser. Knows nothing of Gradio.

Exit codes: 0 done, 2 the person's mistake (said on stderr), 1 our bug (its traceback is in the run's events and on stderr).
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
import time
from collections.abc import Sequence

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, encode
from qlora_ui.jobs import Jobs
from qlora_ui.progress import Progress, log_line
from qlora_ui.runs import Run, Workspace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.command(arguments, Workspace.open(arguments.home))
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    top = argparse.ArgumentParser(prog="python -m qlora_ui", description="4-bit QLoRA fine-tuning and chat.")
    top.add_argument("--home", help="the workspace folder (default: QLORA_UI_HOME, else ./workspace)")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an adapter")
    train.add_argument("--preset", default="starter", help="a file of presets/, without .yaml (default: starter)")
    train.add_argument("--data", help="a file, bundled:NAME or a Hugging Face id (default: the preset's)")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    train.add_argument("--json", action="store_true", help="print the run's events, one JSON object a line")
    train.set_defaults(command=train_command)

    chat = commands.add_parser("chat", help="ask a run's model one question")
    chat.add_argument("--run", required=True, help="the run's id, or 'last'")
    chat.add_argument("--prompt", required=True, help="what to ask")
    chat.add_argument("--base", action="store_true", help="let the base model answer, without the adapter")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (the default) always takes the likeliest token")
    chat.add_argument("--max-new-tokens", type=int, default=200)
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(command=chat_command)

    runs = commands.add_parser("runs", help="list the runs, newest first")
    runs.set_defaults(command=runs_command)
    return top


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Preset, then --data, then each --set, the later winning."""
    values = {"data": arguments.data} if arguments.data is not None else {}
    for assignment in arguments.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} has no '='. Write it as --set key=value.")
        values[name.strip()] = value
    return presets.load(arguments.preset).config.with_values(values)


def train_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Train in the foreground. Ctrl-C stops and keeps what there is."""
    config = read_config(arguments)
    printers: list[threading.Thread] = []
    ended = threading.Event()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_start(run: Run) -> None:
        for number in before:
            signal.signal(number, lambda *_: run.request_stop())
        if not arguments.json:
            print(f"Run {run.id}  (Ctrl-C stops it and keeps the adapter)", flush=True)
        printers.append(threading.Thread(target=follow, args=(run, arguments.json, ended)))
        printers[0].start()

    try:
        run = Jobs(workspace).run_here(config, on_start)
    finally:
        ended.set()
        for printer in printers:
            printer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    failure = next((event for event in run.read()[0] if isinstance(event, Failed)), None)
    if failure is None:
        if not arguments.json and run.adapter.is_dir():
            print(f"Adapter: {run.adapter}")
        return 0
    print(failure.traceback + failure.message if failure.traceback else failure.message, file=sys.stderr)
    return 1 if failure.traceback else 2


def follow(run: Run, as_json: bool, ended: threading.Event) -> None:
    """Print a run's events as they are written, until it has ended and all are printed."""
    offset = 0
    while True:
        last_look = ended.wait(0.2)
        events, offset = run.read(offset)
        for event in events:
            line = encode(event) if as_json else describe(event)
            if line:
                print(line, flush=True)
        if last_look:
            return


def describe(event: Event) -> str:
    """An event as a line with its time of day."""
    line = log_line(event)
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {line}" if line else ""


def chat_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Print the answer as it is written."""
    run = last_with_adapter(workspace) if arguments.run == "last" else workspace.get(arguments.run)
    from qlora_ui.engine.chat import ChatModel, Sampling

    sampling = Sampling(temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    model = ChatModel(run, emit=lambda event: None, should_stop=lambda: False)
    question = [Message(role="user", content=arguments.prompt)]
    printed = ""
    for answers in model.reply([("base" if arguments.base else "adapter", question)], sampling):
        print(answers.texts[0][len(printed) :], end="", flush=True)
        printed = answers.texts[0]
    print()
    return 0


def last_with_adapter(workspace: Workspace) -> Run:
    """The newest run that can be talked to."""
    for run in workspace.all():
        if run.adapter.is_dir():
            return run
    raise UserError(f"No run in {workspace.runs} has an adapter yet. Train one: python -m qlora_ui train", field="run")


def runs_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """One line a run: id and how it stands."""
    workspace.settle()
    for run in workspace.all():
        progress = Progress(run.name)
        for event in run.read()[0]:
            progress.add(event)
        print(f"{run.id}  {progress.status_line().removeprefix(run.name + ' · ')}")
    return 0
