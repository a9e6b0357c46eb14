"""How many tokens a second are trained, and in how much memory? Our default against the reference recipe on today's libraries.

Each contender is a process of its own, so that its peak memory is its own, and makes one optimizer step at its turn, so
that a busy machine is busy for all of them. All train the same rows in the same order: the first rows of the Alpaca
sample, of which only real tokens count. Give the workspace with the starter model in QLORA_UI_HOME.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_ui.config import STARTER_MODEL, RunConfig
from qlora_ui.runs import ENV, Run, Workspace

CHECKOUT = Path(__file__).resolve().parents[2]
CACHED = CHECKOUT / "tests" / ".cache"
ALPACA = CHECKOUT.parent / "shared" / "data" / "alpaca_1k.json"
ROWS, STEPS, WARM_UP = 320, 5, 1  # of a contender; the first pays for memory that is asked for once
# Name -> compute dtype, and whether it is the reference recipe: plain Trainer, one padded row at a time, checkpointing.
CONTENDERS = {
    "our default": ("auto", False),
    "the recipe, bfloat16": ("bfloat16", True),
    "the recipe, float32": ("float32", True),
    "our default, float32": ("float32", False),
}
GOALS = {"the recipe, bfloat16": 3.0, "the recipe, float32": 1.4}


def main() -> None:
    if not ALPACA.is_file():
        raise SystemExit("Skipped: shared/data/alpaca_1k.json is not beside the checkout.")
    home = Path(os.environ.get(ENV, CACHED)).resolve()
    if not (home / "models").is_dir():
        raise SystemExit(f"Skipped: {home} has no models. Set {ENV} to a workspace that has {STARTER_MODEL}.")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.open(folder)
        workspace.models.rmdir()
        workspace.models.symlink_to(home / "models")
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(json.loads(ALPACA.read_text("utf-8"))[:ROWS]), "utf-8")
        report(race(folder, rows))


def race(folder: str, rows: Path) -> dict[str, list[dict[str, Any]]]:
    """What each contender told of its steps, in turns."""
    command = [sys.executable, "-m", "tests.benchmarks.training", folder, str(rows)]
    racers = {
        name: subprocess.Popen([*command, name], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in CONTENDERS
    }
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
    try:
        for racer in racers.values():
            wait_for(racer)
        for _ in range(STEPS):
            for name, racer in racers.items():
                assert racer.stdin is not None
                print("go", file=racer.stdin, flush=True)
                step = wait_for(racer)
                told[name].append(step)
                print(f"step {len(told[name])}, {name}: {step['tokens'] / step['seconds']:.0f} tokens/s", flush=True)
    finally:
        for racer in racers.values():
            racer.kill()
            racer.wait()
    return told


def wait_for(racer: subprocess.Popen[str]) -> dict[str, Any]:
    assert racer.stdout is not None
    for line in racer.stdout:
        if line.startswith('{"'):
            step: dict[str, Any] = json.loads(line)
            return step
        print(line, end="", flush=True)
    raise SystemExit("A contender broke off; its traceback is above.")


def report(told: dict[str, list[dict[str, Any]]]) -> None:
    if len({tuple(step["tokens"] for step in steps) for steps in told.values()}) > 1:
        raise SystemExit("The contenders did not train the same rows in the same steps.")
    paces = {name: [step["tokens"] / step["seconds"] for step in steps[WARM_UP:]] for name, steps in told.items()}
    loss = {name: statistics.mean(step["loss"] for step in steps[-3:]) for name, steps in told.items()}
    print("\n| contender | tokens/s, median | least | most | peak GiB | loss of the last 3 steps |\n|---|---|---|---|---|---|")
    for name, steps in told.items():
        pace = paces[name]
        print(
            f"| {name} | {statistics.median(pace):.0f} | {min(pace):.0f} | {max(pace):.0f} | {steps[-1]['peak']:.2f} | {loss[name]:.4f} |"
        )
    ours, *others = told
    print(f"\n{sum(step['tokens'] for step in told[ours]):,} tokens in {STEPS} steps each, the first {WARM_UP} not timed. {ours}:")
    for name in others:
        ratios = [one / other for one, other in zip(paces[ours], paces[name], strict=True)]
        goal = f" (goal: {GOALS[name]})" if name in GOALS else ""
        print(
            f"{statistics.median(ratios):.2f} times {name}, step by step {min(ratios):.2f} to {max(ratios):.2f}{goal}; "
            f"loss {loss[ours] / loss[name] - 1:+.2%} of its loss (bound: 2 %)"
        )
    print(f"{told[ours][-1]['peak']:.2f} GiB at the most, libraries included (goal: under 3)")


# A contender --------------------------------------------------------------------------------------------------------------


def contend(folder: str, rows: str, name: str) -> None:
    """Train `STEPS` steps, each at a line from stdin, and tell of each in a line."""
    compute_dtype, is_recipe = CONTENDERS[name]
    settings = {"data": rows, "prompt_format": "chatml", "held_out_share": 0, "max_seq_len": 512, "lora_r": 16, "max_steps": STEPS}
    config = RunConfig().with_values({**settings, "compute_dtype": compute_dtype, "warmup_ratio": 0, "save_steps": 1000})
    assert config.effective_batch == 16
    run, lock = Workspace.open(folder).create(config, "contender", {})
    trainer = prepared(run, config, name, is_recipe)
    print(json.dumps({"ready": name}), flush=True)
    trainer.train()
    lock.release()


def prepared(run: Run, config: RunConfig, name: str, is_recipe: bool) -> Any:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from qlora_ui.engine import adapter, hardware, model, tokens, train
    from qlora_ui.events import Event, Log

    def emit(event: Event) -> None:
        if isinstance(event, Log) and not is_recipe:
            print(f"{name}: {event.text}", flush=True)

    def never() -> bool:
        return False

    found = model.find(STARTER_MODEL, "main", run.workspace.models, emit, never)
    tokenizer = model.load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format)
    fitted, held_out = train.encode(run, tokenizer, train.read_rows(run, config, emit, never), emit, never)
    chip = hardware.detect(config.quantization.compute_dtype)
    emit(Log(text=f"Compute dtype {chip.compute_dtype}: {chip.reason}"))
    base = model.load_quantized(found, config.quantization, chip, emit, never)
    adapted = adapter.add_adapter(base, config.adapter, config.optimization.seed)
    real = tokens.Collator(tokenizer.pad_token_id)
    counts: list[int] = []

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        counts.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())

    def plain(batch: Any) -> Any:
        return {key: value for key, value in real(batch).items() if key != tokens.REAL_TOKENS}

    class Turns(TrainerCallback):
        """Waits for its turn before a step, and tells how it went after it. The loss comes a moment later, with the log."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit  # nobody asks any more
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
                step = {"tokens": sum(counts), "seconds": self.seconds, "loss": logs["loss"], "peak": peak}
                counts.clear()
                print(json.dumps(step), flush=True)

    if is_recipe:
        args = train.training_arguments(run, config, chip, has_held_out=False, gradient_checkpointing=True)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = 1, 16
        trainer = Trainer(model=adapted, args=args, train_dataset=fitted, data_collator=plain, processing_class=tokenizer)
    else:
        trainer = train.make_trainer(run, config, chip, adapted, tokenizer, fitted, held_out, emit, never)
    adapted.register_forward_pre_hook(count, with_kwargs=True)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns())
    return trainer


if __name__ == "__main__":
    contend(*sys.argv[1:])
