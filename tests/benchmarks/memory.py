"""Does a training take what the planner forecasts? Each configuration is a process of its own, so that its peak is its own.

On a CPU: the starter model, small ones of other architectures with random weights, which take as much as trained ones, and the
peak of the whole process. On a GPU: models of the presets' shapes with random weights, and the most that torch allocated; the
forecast is then taken without its overhead, which is what torch does not allocate. Rows are as long as they may be, and all their
tokens are trained, as the planner assumes. Give the workspace with the starter model in QLORA_UI_HOME.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from qlora_ui.config import STARTER_MODEL, RunConfig
from qlora_ui.events import Event, Failed, Log
from qlora_ui.memory.devices import GIB
from qlora_ui.memory.forecast import forecast
from qlora_ui.model_configs import shipped
from qlora_ui.model_shapes import find_shape
from qlora_ui.runs import ENV, Workspace

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 3  # the optimizer's state is there from the second on
COMMON = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "held_out_share": 0, "sample_every": 0, "train_on": "everything"}
ON_CPU: list[dict[str, Any]] = [
    {"gradient_checkpointing": "off"},
    {"gradient_checkpointing": "on"},
    {"gradient_checkpointing": "off", "compute_dtype": "float32"},
    {"gradient_checkpointing": "off", "max_seq_len": 1024, "micro_batch_size": 1, "lora_dropout": 0},
    {"gradient_checkpointing": "off", "lora_r": 64},
    {"gradient_checkpointing": "off", "quant_bits": 16},
]
# Architectures that no reader of configs knows: small ones with random weights.
RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257, "n_positions": 1024},
    "phi": {"model_type": "phi", "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "olmoe": {
        "model_type": "olmoe",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}
ON_CPU += [
    {"model": "gpt2", "gradient_checkpointing": "off"},
    {"model": "gpt2", "gradient_checkpointing": "off", "compute_dtype": "float32"},
    {"model": "phi", "gradient_checkpointing": "off"},
    {"model": "phi", "gradient_checkpointing": "on"},
    {"model": "olmoe", "gradient_checkpointing": "off", "lora_dropout": 0},
    {"model": "olmoe", "gradient_checkpointing": "on", "lora_dropout": 0},
]
SMALL, MIDDLE, LARGE = "allenai/OLMo-2-0425-1B-Instruct", "HuggingFaceTB/SmolLM3-3B", "Qwen/Qwen3-8B"
ON_GPU: list[dict[str, Any]] = [
    {"model": SMALL, "gradient_checkpointing": "off"},
    {"model": SMALL, "gradient_checkpointing": "on"},
    {"model": SMALL, "gradient_checkpointing": "off", "quant_bits": 8},
    {"model": SMALL, "gradient_checkpointing": "off", "quant_bits": 16, "lora_dropout": 0},
    {"model": MIDDLE, "gradient_checkpointing": "off", "micro_batch_size": 2},
    {"model": MIDDLE, "gradient_checkpointing": "on", "lora_r": 64, "max_seq_len": 1024},
    {"model": MIDDLE, "gradient_checkpointing": "on", "packing": "off", "optimizer": "adamw_8bit"},
    {"model": LARGE, "gradient_checkpointing": "on", "micro_batch_size": 2},
]


def main() -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    home = Path(os.environ.get(ENV, CHECKOUT / "tests" / ".cache")).resolve()
    if not on_gpu and not (home / "models").is_dir():
        raise SystemExit(f"Skipped: {home} has no models. Set {ENV} to a workspace that has {STARTER_MODEL}.")
    print("| configuration | base, forecast | base, measured | all, forecast GiB | peak, measured GiB | forecast / measured |")
    print("|---|---|---|---|---|---|")
    for values in ON_GPU if on_gpu else ON_CPU:
        with tempfile.TemporaryDirectory() as folder:
            if (name := values.get("model")) in RANDOM:  # made here, so that the peak is not that of making it
                random_model(Workspace.open(folder).models / name, RANDOM[name], "cpu")
            measured = child(folder, home, {**COMMON, **values})
        told = " ".join(f"{name}={value}" for name, value in values.items())
        total = measured["forecast"]
        print(
            f"| {told} | {measured['base_forecast']:,} | {measured['base']:,} | {total / GIB:.2f} | {measured['peak'] / GIB:.2f} "
            f"| {total / measured['peak']:.2f} |",
            flush=True,
        )
    if not on_gpu:
        print(f"\nThe process with the training stack, before it trains: {measured['libraries'] / GIB:.2f} GiB")


def child(folder: str, home: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What the process of one configuration told."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", folder, str(home), json.dumps(values)]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# A configuration ----------------------------------------------------------------------------------------------------------


def measure(folder: str, home: str, values: dict[str, Any]) -> None:
    """Train a few steps and print what they took."""
    import torch

    from qlora_ui.engine import train
    from qlora_ui.engine.hardware import detect
    from qlora_ui.engine.model import load_quantized

    on_gpu = torch.cuda.is_available()
    workspace, rows = Workspace.open(folder), Path(folder) / "rows.json"
    config = RunConfig().with_values({**values, "data": str(rows), "prompt_format": "alpaca"})
    if on_gpu:
        random_model(workspace.models / config.model.model.replace("/", "--"), shipped()[config.model.model], "cuda")
    elif config.model.model not in RANDOM:
        workspace.models.rmdir()
        workspace.models.symlink_to(Path(home) / "models")
    long = "word " * config.data.max_seq_len
    rows.write_text(json.dumps([{"instruction": f"{n}", "output": f"{n} {long}"} for n in range(STEPS * config.effective_batch)]))
    told: dict[str, Any] = {"libraries": peak_of_process()}

    def load_and_weigh(*arguments: Any) -> Any:
        base = load_quantized(*arguments)
        told["base"] = base_size(base)
        return base

    run, lock = workspace.create(config, "memory", {})
    with lock, mock.patch.object(train, "load_quantized", load_and_weigh):
        train.train(run, emit, lambda: False)
    told["peak"] = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()

    planned = forecast(find_shape(config.model.model, "main", workspace.models), config, detect(config.quantization.compute_dtype).device())
    told["base_forecast"] = planned.terms.base
    told["forecast"] = planned.total - (planned.terms.overhead if on_gpu else 0)
    print(json.dumps(told))


def random_model(folder: Path, config: dict[str, Any], device: str) -> None:
    """A model of that config with the tests' tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(CHECKOUT / "tests"))
    import tiny

    with torch.device(device):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    base.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    del base
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def base_size(base: Any) -> int:
    """Bytes of all weights, and of the constants of those that are quantized."""
    from qlora_ui.engine.layers import measure_storage

    whole = [p for p in base.parameters() if not (hasattr(p, "quant_state") or hasattr(p, "SCB"))]
    is_quantized = len(whole) < len(list(base.parameters()))
    return int(sum(parameter.nbytes for parameter in whole)) + (measure_storage(base).bytes if is_quantized else 0)


def peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def emit(event: Event) -> None:
    if isinstance(event, Failed) or (isinstance(event, Log) and event.level == "warning"):
        print(event, file=sys.stderr)


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
