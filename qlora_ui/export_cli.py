"""`python -m qlora_ui export`: a run's model to take away. Knows nothing of Gradio; loads the engine when all else is checked."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator

from qlora_ui import exporting, exports
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.jobs import Jobs
from qlora_ui.progress import amount
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

CANCELLED = 130  # what shells know of Ctrl-C: whoever waits for the export must not take it for done


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command and its flags."""
    export = commands.add_parser("export", help="take away a run's adapter, its merged model, or a folder that chats")
    export.add_argument("--run", required=True, help="the run's id, or last for the newest with an adapter")
    kind = export.add_mutually_exclusive_group(required=True)
    kind.add_argument("--adapter", dest="kind", action="store_const", const="adapter", help="the adapter, as PEFT reads it")
    kind.add_argument("--merged", dest="kind", action="store_const", const="merged", help="base and adapter in one, in 16 bits")
    kind.add_argument("--folder", dest="kind", action="store_const", const="folder", help="adapter, README and a script that chats")
    export.add_argument("--to", required=True, metavar="PATH", help="a new folder; for --adapter also a new .zip")
    export.add_argument("--checkpoint", type=int, metavar="STEP", help="the weights after that step (default: the result, else the newest)")
    export.add_argument("--quantize", choices=["nf4"], help="with --merged: quantize it again, as bitsandbytes stores it")
    export.add_argument("--push", default="", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub too (token: HF_TOKEN or login)")
    export.add_argument("--public", action="store_true", help="with --push: a new repository can be seen by all")
    export.add_argument("--json", action="store_true", help="print what was made as one JSON object")
    export.set_defaults(command=export_command)


def export_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Export, telling the way on the go. Ctrl-C leaves nothing."""
    if arguments.public and not arguments.push:
        raise UserError("--public is for --push: without it nothing is uploaded.")
    workspace.settle()
    run = last_with_adapter(workspace) if arguments.run == "last" else workspace.get(arguments.run)
    wish = exports.plan(
        run, arguments.kind, arguments.to, arguments.checkpoint, arguments.quantize is not None, arguments.push, not arguments.public
    )
    told = sys.stderr if arguments.json else sys.stdout

    def emit(event: Event) -> None:
        if isinstance(event, Log):
            print(("\r\033[K" if sys.stderr.isatty() else "") + event.text, file=told, flush=True)
        elif isinstance(event, PhaseProgress) and sys.stderr.isatty():
            print(f"\r\033[K{amount(event)}", end="", file=sys.stderr, flush=True)

    with stop_on_signals() as stop, Jobs(workspace).lend(run):
        try:
            made = exporting.carry_out(wish, emit, stop.is_set)
        except Cancelled:
            print(f"Cancelled: {exporting.cancelled_words(wish)}.", file=sys.stderr)
            return CANCELLED
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(made.export), "pushed": made.pushed}, default=str))
    else:
        print(f"{made.export.verification.sentence()}\nWrote {made.export.path} ({exports.size_words(made.export.bytes)})")
    return 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and a polite kill set, in place of ending the process anywhere."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_with_adapter(workspace: Workspace) -> Run:
    """The newest run that can be talked to."""
    for run in workspace.all():
        if run.adapter.is_dir():
            return run
    raise UserError(f"No run in {workspace.runs} has an adapter yet. Train one: python -m qlora_ui train", field="run")
