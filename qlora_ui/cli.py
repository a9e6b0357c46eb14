"""The same engine without a browser. Knows nothing of Gradio.

Exit codes: 0 done, 2 the person's mistake (said on stderr), 1 our bug (its traceback is in the run's events and on stderr).
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_ui import adapters, export_cli, plan_cli, presets, queue_cli, speakers
from qlora_ui.config import RunConfig
from qlora_ui.data import columns, reasons, sources
from qlora_ui.data.checks import Dropped, NothingKept, Report
from qlora_ui.data.formats import FORMATS, Message
from qlora_ui.data.lengths import LengthReport, lengths_of_nothing
from qlora_ui.errors import UserError
from qlora_ui.events import Event, encode
from qlora_ui.export_cli import last_with_adapter
from qlora_ui.inspection import Inspector, Look
from qlora_ui.jobs import Jobs, OnStart
from qlora_ui.progress import fold, log_line
from qlora_ui.runs import Run, Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.talking import EngineChat

ISOLATED = "train in a process of its own, which cannot take this one down"


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
    train.add_argument("--isolated", action="store_true", help=ISOLATED)
    train.set_defaults(command=train_command)

    resume = commands.add_parser("resume", help="go on with a run from its newest complete checkpoint")
    resume.add_argument("--run", required=True, help="the run's id, or 'last'")
    resume.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="go on with another setting; may be repeated")
    resume.add_argument("--json", action="store_true", help="print the run's events from here on, one JSON object a line")
    resume.add_argument("--isolated", action="store_true", help=ISOLATED)
    resume.set_defaults(command=resume_command)

    check = commands.add_parser("check-data", help="say what training would make of a data set")
    check.add_argument("data", metavar="FILE_OR_ID", help="a file, a folder of files, bundled:NAME or a Hugging Face id")
    check.add_argument("--format", default="auto", help=f"how rows are written: auto (the default), {', '.join(FORMATS)}")
    check.add_argument("--map", action="append", default=[], metavar="FIELD=COLUMN", help="which column holds a field; may be repeated")
    check.add_argument("--preset", default="starter", help="whose model, prompt format and lengths to measure with (default: starter)")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    check.add_argument("--json", action="store_true", help="print the report as one JSON object")
    check.set_defaults(command=check_data_command)

    chat = commands.add_parser("chat", help="ask a run, a checkpoint, an adapter or a base model one question")
    chat.add_argument("--run", help="the run's id, or 'last'")
    chat.add_argument("--checkpoint", type=int, metavar="STEP", help="with --run: its checkpoint of that step")
    chat.add_argument("--adapter", help="a folder, a zip, a name in the workspace's adapters, or owner/name[@revision] on the Hub")
    chat.add_argument("--model", help="a base model: owner/name or a folder; with --adapter: in place of the base that it names")
    chat.add_argument("--prompt", required=True, help="what to ask")
    chat.add_argument("--base", action="store_true", help="let the base model answer, without the adapter")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (the default) always takes the likeliest token")
    chat.add_argument("--max-new-tokens", type=int, default=200)
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(command=chat_command)

    script = commands.add_parser("script", help="write a folder with script and notebook that train a run again without this app")
    script.add_argument("--run", required=True, help="the run's id, or 'last'")
    script.add_argument("--to", required=True, metavar="FOLDER", help="the folder to make")
    script.set_defaults(command=script_command)

    plan = commands.add_parser("plan", help="say what memory a run would take, before it is started")
    plan_cli.add_arguments(plan)
    plan.set_defaults(command=plan_command)
    export_cli.add_parser(commands)
    queue_cli.add_parsers(commands, read_config, follow)

    runs = commands.add_parser("runs", help="list the runs, newest first")
    runs.set_defaults(command=runs_command)
    return top


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Preset, then --data, then each --set, the later winning."""
    values = {"data": arguments.data} if arguments.data is not None else {}
    return presets.load(arguments.preset).config.with_values({**values, **settings(arguments)})


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """What --set says, the later winning."""
    return dict(assigned("--set", assignment) for assignment in arguments.set)


def assigned(flag: str, assignment: str) -> tuple[str, str]:
    """`key=value` in two. Raises UserError."""
    name, equals, value = assignment.partition("=")
    if not equals:
        raise UserError(f"{flag} {assignment!r} has no '='. Write it as {flag} key=value.")
    return name.strip(), value.strip()


def check_data_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Print what training would make of a data set. Ends with 2 when that is nothing."""
    mapping = columns.write(dict(assigned("--map", pair) for pair in arguments.map))
    config = read_config(arguments).with_values({"data_format": arguments.format, "columns": mapping})
    seen: Look | None = None
    try:
        for seen in Inspector(workspace, within=None).look(config, fetch=True):
            if sys.stderr.isatty():
                print(f"\r\033[K{seen.doing}", end="", file=sys.stderr, flush=True)
    except NothingKept as error:
        nothing = lengths_of_nothing(config.data.max_seq_len, config.data.long_rows)
        print(json.dumps(data_report(error.report, nothing)) if arguments.json else data_words(error.report, nothing))
        raise
    if seen is None or seen.data is None or seen.lengths is None:
        raise UserError(seen.problem or seen.no_tokens if seen else f"{arguments.data} could not be read.")
    if arguments.json:
        print(json.dumps(data_report(seen.data.report, seen.lengths, seen.trouble)))
    else:
        print(data_words(seen.data.report, seen.lengths, seen.left_out, seen.trouble))
    if seen.problem:
        print(seen.problem, file=sys.stderr)
    return 2 if seen.problem else 0


def data_report(report: Report, lengths: LengthReport, trouble: str = "") -> dict[str, object]:
    """The report as scripts read it. Tokens are those that training reads, after long rows were dealt with."""
    return {
        **report.to_dict(),
        "tokens_total": lengths.tokens_total,
        "tokens_trained": lengths.tokens_trained,
        "trained_share": lengths.trained_share,
        "longest": lengths.longest,
        "max_seq_len": lengths.max_seq_len,
        "long_rows": lengths.long_rows,
        "truncated_at_max_seq_len": lengths.over,
        "tokens_lost": lengths.tokens_lost,
        "trained_lost": lengths.trained_lost,
        "untrainable": list(lengths.untrainable),
        "too_long": list(lengths.too_long),
        "suggested_max_seq_len": lengths.suggested_max_seq_len,
        "padding_share": lengths.padding_share,
        "padding_share_packed": lengths.padding_share_packed,
        "trouble": trouble,
    }


def data_words(report: Report, lengths: LengthReport, left_out: Sequence[Dropped] = (), trouble: str = "") -> str:
    """The report as a person reads it."""
    formats = ", ".join(f"{name} {rows:,}" for name, rows in report.formats.items())
    scripts = ", ".join(f"{name} {rows:,}" for name, rows in report.scripts.items())
    unanswered = f", {report.empty_answers:,} without an answer" if report.empty_answers else ""
    lines = [f"{sources.shown(report.source)}: {report.summary()}{unanswered}"]
    if report.kept:
        lines += [
            f"Formats: {formats}. Scripts: {scripts}.",
            f"Tokens: {lengths.tokens_total:,}, of which {lengths.tokens_trained:,} ({lengths.trained_share:.0%}) are trained. "
            f"The longest row has {lengths.longest:,}.",
            f"Rows longer than max_seq_len {lengths.max_seq_len:,}: {lengths.over:,}. {lengths.tokens_lost:,} tokens are not read, "
            f"{lengths.trained_lost:,} fewer are trained. Suggested: {lengths.suggested_max_seq_len:,}.",
            f"Padding: {lengths.padding_share:.0%} of a batch, {lengths.padding_share_packed:.0%} if packed.",
        ]
    if left_out:
        lines.append(f"Kept, but not trained on: {len(left_out):,} of the rows.")
    if trouble:
        lines.append(trouble)
    if report.unused_columns:
        lines.append(f"Columns that are not read: {', '.join(report.unused_columns)}.")
    if report.held_out_split:
        lines.append(f"Held out: {report.held_out_rows:,} rows of the split {report.held_out_split}.")
    listed = {"Left out": left_out, "Dropped": report.dropped, f"Dropped from {report.held_out_split}": report.held_out_dropped}
    for title, dropped in listed.items():
        lines += [f"{title}: {where}: {reason}" for reason, where in reasons.in_words(dropped).items()]
    return "\n".join(lines)


def plan_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Print what memory a run would take."""
    data = {} if arguments.data is None else {"data": arguments.data}
    config = plan_cli.read_config(arguments.preset, arguments.model, {**data, **settings(arguments)})
    return plan_cli.plan(config, workspace, arguments.gpu, arguments.probe, arguments.json)


def train_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Train in the foreground. Ctrl-C stops and keeps what there is."""
    config = read_config(arguments)
    return in_the_foreground(lambda on_start: Jobs(workspace).run_here(config, on_start, isolated=arguments.isolated), arguments.json)


def resume_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Go on in the foreground, as `train` does."""
    run = newest(workspace) if arguments.run == "last" else workspace.get(arguments.run)
    changes = settings(arguments)
    return in_the_foreground(
        lambda on_start: Jobs(workspace).resume_here(run, changes, on_start, isolated=arguments.isolated), arguments.json
    )


def newest(workspace: Workspace) -> Run:
    """The run that was started last."""
    run = workspace.newest()
    if run is None:
        raise UserError(f"There is no run in {workspace.runs} yet. Train one: python -m qlora_ui train", field="run")
    return run


def in_the_foreground(work: Callable[[OnStart], Run], as_json: bool) -> int:
    """Do a training whose events are printed as they come; the exit code says how it ended."""
    printers: list[threading.Thread] = []
    ended = threading.Event()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_start(run: Run, offset: int) -> None:
        for number in before:
            signal.signal(number, lambda *_: run.ask("stop"))
        if not as_json:
            print(f"Run {run.id}  (Ctrl-C stops it and keeps the adapter)", flush=True)
        printers.append(threading.Thread(target=follow, args=(run, as_json, ended, offset)))
        printers[0].start()

    try:
        run = work(on_start)
    finally:
        ended.set()
        for printer in printers:
            printer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not run.folder.is_dir():
        return 0  # discarded
    how = fold(run.name, run.read()[0])
    if how.failure is None:
        if not as_json and run.adapter.is_dir():
            print(f"Adapter: {run.adapter}")
        if not as_json and how.resumable:
            print(f"Go on with: python -m qlora_ui resume --run {run.id}")
        return 0
    print(how.failure.traceback + how.end_sentence(), file=sys.stderr)
    return 1 if how.failure.traceback else 2


def follow(run: Run, as_json: bool, ended: threading.Event, offset: int) -> None:
    """Print a run's events after `offset` bytes as they are written, until it has ended and all are printed."""
    stdout = sys.stdout  # which is another while a tracker chats
    while True:
        last_look = ended.wait(0.2)
        try:
            events, offset = run.read(offset)
        except FileNotFoundError:
            return  # discarded, or deleted by somebody
        for event in events:
            line = encode(event) if as_json else describe(event)
            if line:
                print(line, file=stdout, flush=True)
        if last_look:
            return


def describe(event: Event) -> str:
    """An event as a line with its time of day."""
    line = log_line(event)
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {line}" if line else ""


def chat_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Print the answer as it is written; on stderr, what is waited for and what there is to warn of."""
    speaker = chat_speaker(arguments, workspace)
    from qlora_ui.engine import decoding

    sampling = decoding.Sampling(temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    asked = [(speaker.base if arguments.base else speaker, [Message(role="user", content=arguments.prompt)])]
    printed, noted = "", ""
    for answers in EngineChat(workspace).reply(asked, sampling):
        if answers.note != noted:
            print_aside(answers.note)
        print(answers.texts[0][len(printed) :], end="", flush=True)
        printed, noted = answers.texts[0], answers.note
    print()
    return 0


def print_aside(note: str) -> None:
    """What is waited for, in one line of a terminal that comes and goes; without a terminal, how far it is is not told."""
    if sys.stderr.isatty():
        print(f"\r\033[K{note}", end="" if note.endswith("…") or "… " in note or not note else "\n", file=sys.stderr, flush=True)
    elif note and "… " not in note:
        print(note, file=sys.stderr)


def chat_speaker(arguments: argparse.Namespace, workspace: Workspace) -> Speaker:
    """Whom the flags name. Raises UserError when that is nobody, or more than one."""
    if arguments.run and not (arguments.adapter or arguments.model):
        run = last_with_adapter(workspace) if arguments.run == "last" else workspace.get(arguments.run)
        return speakers.of_run(run, arguments.checkpoint)
    if arguments.adapter and not arguments.run and arguments.checkpoint is None:
        return adapters.named(arguments.adapter, workspace, lambda event: None, lambda: False, arguments.model or "")
    if arguments.model and not arguments.run and arguments.checkpoint is None:
        return speakers.bare(arguments.model)
    raise UserError("Say who is asked: --run ID (with --checkpoint STEP if you like), --adapter (with --model), or --model.")


def script_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """Write what trains the run again elsewhere."""
    run = last_with_adapter(workspace) if arguments.run == "last" else workspace.get(arguments.run)
    from qlora_ui.engine import script

    folder = Path(arguments.to).expanduser().resolve()
    script.write(run, folder)
    print(f"Written to {folder}. Train with: python {folder / 'train.py'}")
    return 0


def runs_command(arguments: argparse.Namespace, workspace: Workspace) -> int:
    """One line a run: id and how it stands."""
    workspace.settle()
    for run in workspace.all():
        stands = fold(run.name, run.read()[0])
        print(f"{run.id}  {stands.status_line().removeprefix(run.name + ' · ')}")
    return 0
