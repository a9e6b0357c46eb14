"""Do 50,000 Alpaca-shaped rows get from a file to a report in time, and in how much memory? And how soon does a sample answer?

The rows are seeded and as long as Alpaca's: a short instruction, an input in four of ten, an answer that is sometimes long.
Give the workspace with the starter model in QLORA_UI_HOME.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_ui.config import STARTER_MODEL, DataConfig
from qlora_ui.runs import ENV, Workspace

ROWS, SAMPLE = 50_000, 1_000
CACHED = Path(__file__).resolve().parents[1] / ".cache"
SYLLABLES = (
    "ba",
    "con",
    "der",
    "est",
    "fi",
    "gra",
    "hol",
    "ing",
    "ka",
    "lum",
    "mi",
    "no",
    "or",
    "pre",
    "qui",
    "ra",
    "sen",
    "ta",
    "un",
    "ver",
)


def write_rows(path: Path, count: int) -> None:
    """Words are drawn by rank, as in any language, so that a tokenizer finds both whole words and rare ones."""
    chance = random.Random(20261122)
    words = ["the", "of", "and", "to", "in", "is", "that", "for", "with", "as", "are", "this", "you", "be", "on", "it", "can", "or", "from"]
    words += ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(8_000)]
    ranks = [1 / (rank + 2) for rank in range(len(words))]

    def text(median: float, spread: float) -> str:
        number = max(3, min(600, round(chance.lognormvariate(median, spread))))
        return " ".join(chance.choices(words, ranks, k=number)).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"instruction": text(2.4, 0.4), "input": text(2.5, 0.8) if chance.random() < 0.4 else "", "output": text(3.6, 0.9)}
            file.write(json.dumps(row) + "\n")


@contextmanager
def timed(name: str, rows: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print(f"| {name} | {seconds:.2f} | {rows / seconds:,.0f} | {peak_gib():.2f} |", flush=True)


def peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    home = Path(os.environ.get(ENV, CACHED))
    with tempfile.TemporaryDirectory() as folder:
        path, sample = Path(folder) / "rows.jsonl", Path(folder) / "sample.jsonl"
        write_rows(path, ROWS)
        with path.open(encoding="utf-8") as lines:
            sample.write_text("".join(next(lines) for _ in range(SAMPLE)), "utf-8")
        measure(home, path, sample, Path(folder))


def measure(home: Path, path: Path, sample: Path, folder: Path) -> None:
    from qlora_ui.data import checks
    from qlora_ui.engine.model import find_here, load_tokenizer
    from qlora_ui.engine.preview import open_preview

    def never() -> bool:
        return False

    def nothing(done: int) -> None:
        pass

    found = find_here(STARTER_MODEL, "main", Workspace.open(home).models)
    if found is None:
        raise SystemExit(f"{STARTER_MODEL} is not in {home}: set {ENV} to a workspace that has it.")
    config = DataConfig(data=str(path))
    print("| phase | seconds | rows per second | peak GiB |\n|---|---|---|---|")
    with timed("the tokenizer, once", 1):
        tokenizer = load_tokenizer(found)
    with timed(f"first answer, from {SAMPLE:,} rows", SAMPLE):
        first = checks.prepare(DataConfig(data=str(sample)))
        shown = open_preview(tokenizer, first.conversations, first.report.fingerprint, config, folder / "cache", never, nothing)
        shown.report(config.max_seq_len, config.long_rows, 4, 42)
        shown.views(range(20), config.max_seq_len, config.long_rows)
    started = time.perf_counter()
    with timed("read and checked", ROWS):
        data = checks.prepare(config)
    with timed("rendered and tokenized", ROWS):
        preview = open_preview(tokenizer, data.conversations, data.report.fingerprint, config, folder / "cache", never, nothing)
    with timed("length report", ROWS):
        report = preview.report(config.max_seq_len, config.long_rows, 4, 42)
    total = time.perf_counter() - started
    with timed("length report, setting moved", ROWS):
        preview.report(config.max_seq_len // 2, "split", 4, 42)
    with timed("20 rows shown", 20):
        preview.views(preview.order("longest", config.max_seq_len)[:20], config.max_seq_len, config.long_rows)
    with timed("tokenized again, from the cache", ROWS):
        open_preview(tokenizer, data.conversations, data.report.fingerprint, config, folder / "cache", never, nothing)
    print(
        f"\n{total:.1f} s for {ROWS:,} rows of {report.tokens_total + report.tokens_lost:,} tokens, {report.trained_share:.0%} trained; ",
        end="",
    )
    print(f"{peak_gib():.2f} GiB at the most, libraries included (bounds: 60 s, 2 GB)")
