"""`python -m qlora_ui queue` and `sweep`: trainings in line, one after another. Knows nothing of Gradio or torch."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_ui import queue_runner, sweeping
from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.inspection import Inspector
from qlora_ui.jobs import Jobs, run_name
from qlora_ui.overview import facts_of, measured_pace, of_sweep
from qlora_ui.progress import Progress, fold
from qlora_ui.queueing import Entry, Queue
from qlora_ui.runs import Run, Workspace

ReadConfig = Callable[[argparse.Namespace], RunConfig]
Follow = Callable[[Run, bool, threading.Event, int], None]
"""Prints a run's events as they come, until it has ended."""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser], read_config: ReadConfig, follow: Follow) -> None:
    """The two commands and their flags."""
    queue = commands.add_parser("queue", help="put trainings in line, and train them one after another")
    what = queue.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", dest="what", action="store_const", const=partial(add, read_config), help="put a training at the end")
    what.add_argument("--list", dest="what", action="store_const", const=show, help="show what waits, in its order")
    what.add_argument("--run", dest="what", action="store_const", const=partial(run, follow), help="train until nothing waits any more")
    what.add_argument("--hold", dest="what", action="store_const", const=hold, help="begin with nothing more, whoever runs the queue")
    what.add_argument("--remove", metavar="ID", help="take one out of the line")
    what.add_argument("--up", metavar="ID", help="move one a place towards the front")
    what.add_argument("--down", metavar="ID", help="move one a place towards the end")
    queue.add_argument("--json", action="store_true", help="with --list: one JSON object; with --run: the events, one JSON object a line")
    add_settings(queue)
    queue.set_defaults(command=queue_command)

    sweep = commands.add_parser("sweep", help="put a training in line for each combination of some values, or show how they came out")
    sweep.add_argument("--over", action="append", default=[], metavar="KEY=A,B", help="values of a setting to try; for one setting or two")
    sweep.add_argument("--dry-run", action="store_true", help="only say what it would be")
    sweep.add_argument("--results", action="store_true", help="how the runs of the newest sweep came out, best first")
    add_settings(sweep)
    sweep.set_defaults(command=partial(sweep_command, read_config))


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="starter", help="a file of presets/, without .yaml (default: starter)")
    parser.add_argument("--data", help="a file, bundled:NAME or a Hugging Face id (default: the preset's)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    parser.add_argument("--isolated", action="store_true", help="train in a process of its own")


def queue_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Do the one thing that was asked for."""
    queue = Queue.of(workspace)
    if arguments.what is not None:
        code: int = arguments.what(arguments, workspace, queue)
        return code
    entry = queue.find(arguments.remove or arguments.up or arguments.down)
    if arguments.remove:
        queue.remove(entry.id)
    else:
        queue.move(entry.id, -1 if arguments.up else 1)
    return 0


def add(read_config: ReadConfig, arguments: argparse.Namespace, workspace: Workspace, queue: Queue) -> int:
    """Put a training in line, when it could begin as far as that is known at once."""
    config = read_config(arguments)
    check(workspace, config, arguments.isolated)
    (entry,) = queue.add([Entry(config=config, isolated=arguments.isolated)])
    print(f"{entry.id} waits as number {len(queue.entries())}.{how_to_train(queue)}")
    return 0


def check(workspace: Workspace, config: RunConfig, isolated: bool) -> None:
    """Raise UserError for what surely could not be trained."""
    queue_runner.check(workspace, config, isolated)
    Inspector(workspace, within=None).read(config.data)


def how_to_train(queue: Queue) -> str:
    return "" if queue.is_going() else " Train what waits with: python -m qlora_ui queue --run"


def show(arguments: argparse.Namespace, workspace: Workspace, queue: Queue) -> int:
    """What waits, a line each, and whether somebody works through it."""
    entries = queue.entries()
    if arguments.json:
        listed = [{"id": entry.id, "name": called(entry), "trouble": entry.trouble, "sweep": entry.sweep} for entry in entries]
        print(json.dumps({"going": queue.is_going(), "entries": listed}))
        return 0
    for place, entry in enumerate(entries, 1):
        what = f"{entry.config.model.model}  {sources.shown(entry.config.data.data)}" if entry.config else ""
        print(f"{place}  {entry.id}  {called(entry)}  {what}  {entry.trouble}".rstrip())
    print("The queue is going." if queue.is_going() else queue.why_held() or "The queue is held: nothing begins until it is started.")
    return 0


def called(entry: Entry) -> str:
    return entry.name or (run_name(entry.config) if entry.config else entry.id)


def hold(arguments: argparse.Namespace, workspace: Workspace, queue: Queue) -> int:
    """Begin with nothing more; what trains goes on to its end."""
    queue.hold()
    return 0


def run(follow: Follow, arguments: argparse.Namespace, workspace: Workspace, queue: Queue) -> int:
    """Train what waits, in the foreground. Ctrl-C stops the run that trains, keeps its adapter, and holds the queue."""
    jobs, ended, interrupted, code = Jobs(workspace), threading.Event(), threading.Event(), 0
    printers: list[threading.Thread] = []
    trains: list[Run] = []

    def begin(entry: Entry) -> Run:
        assert entry.config is not None
        return jobs.start(entry.config, isolated=entry.isolated, name=entry.name, facts=entry.facts())

    def on_start(started: Run) -> None:
        if not arguments.json:
            print(f"Run {started.id}  (Ctrl-C stops it, keeps the adapter and holds the queue)", flush=True)
        trains.append(started)
        if interrupted.is_set():  # while it was begun
            started.ask("stop")
        ended.clear()
        printers.append(threading.Thread(target=follow, args=(started, arguments.json, ended, 0)))
        printers[-1].start()

    def on_end(started: Run) -> None:
        nonlocal code
        trains.clear()
        ended.set()
        printers.pop().join()
        code = worse(code, exit_code(started))

    def interrupt(*_: Any) -> None:
        interrupted.set()
        queue.hold("Held, because Ctrl-C was pressed in the terminal that worked through it.")
        for started in trains:
            started.ask("stop")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        queue.let_go()
        queue_runner.QueueRunner(workspace, begin).go(until_empty=True, on_start=on_start, on_end=on_end)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for entry in queue.entries():
        if entry.trouble:
            print(f"{entry.id} could not begin: {entry.trouble}", file=sys.stderr)
            code = worse(code, 2)
    return code


def worse(one: int, other: int) -> int:
    """A bug of ours before a person's mistake before none."""
    return min(filter(None, (one, other)), default=0)


def exit_code(ended: Run) -> int:
    """As that of `train`: 0 where it ended as its owner wished, 2 what a person can mend, 1 our bug."""
    how = progress(ended) if ended.is_there() else None
    if how is None or how.failure is None:
        return 0
    print(f"{ended.id}: {how.failure.traceback}{how.end_sentence()}", file=sys.stderr)
    return 1 if how.failure.traceback else 2


# A sweep ------------------------------------------------------------------------------------------------------------------


def sweep_command(read_config: ReadConfig, arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Check every combination, say what they will be, and only then put them in line."""
    if arguments.results:
        return results(workspace)
    config, queue = read_config(arguments), Queue.of(workspace)
    over = {}
    for told in arguments.over:
        name, _, values = told.partition("=")
        if name.strip() in over:
            raise UserError(f"--over names {name.strip()} twice. Write all its values in one, with commas.", field=name.strip())
        over[name.strip()] = sweeping.read_values(name.strip(), values)
    configs = sweeping.combinations(config, over)
    inspector = Inspector(workspace, within=None)
    for one in configs.values():
        queue_runner.check(workspace, one, arguments.isolated)

    def pace(one: RunConfig) -> float | None:
        return measured_pace(workspace, progress, one) or measured_pace(workspace, progress, config)

    print(sweeping.plan_words(sweeping.plans(list(configs.values()), inspector, pace)))
    if arguments.dry_run:
        print("\n".join(configs))
        return 0
    for entry in queue.add(sweeping.entries(configs, over, arguments.isolated)):
        print(f"{entry.id}  {entry.name}")
    print(f"They wait.{how_to_train(queue)}")
    return 0


def progress(of: Run) -> Progress:
    return fold(of.name, of.read()[0])


def results(workspace: Workspace) -> int:
    """The runs of the newest sweep, best held-out loss first."""
    sweep = next((name for of in workspace.all() if (name := str(facts_of(of).get("sweep", "")))), "")
    if not sweep:
        raise UserError(f"No run in {workspace.runs} belongs to a sweep yet. Make one: python -m qlora_ui sweep --over lora_r=8,16")
    stands = {of.id: progress(of) for of in of_sweep(workspace, sweep)}
    best = {run_id: how.best.loss for run_id, how in stands.items() if how.best}
    print(sweep)
    for run_id, how in sorted(stands.items(), key=lambda item: best.get(item[0], float("inf"))):
        mark = "*" if best and best.get(run_id) == min(best.values()) else " "
        loss = f"{best[run_id]:.4f}" if run_id in best else "–"
        print(f"{mark} {loss}  {run_id}  {how.state}, {how.step} of {how.total_steps} steps")
    return 0
