"""What a run is told to do: frozen parts, each knob declared once. Knows nothing of disk, torch or Gradio.

Form, preset check, command-line flag and README table all derive from `KNOBS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from qlora_ui.errors import UserError

VERSION = 1
STARTER_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def knob(
    default: Any,
    label: str,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    main: bool = False,
) -> Any:
    """Declare a hyperparameter: a dataclass field that carries its bounds (inclusive), unit, label and help."""
    return field(
        default=default, metadata={"label": label, "help": help, "unit": unit, "low": low, "high": high, "choices": choices, "main": main}
    )


class _Checked:
    """Every part checks its own values when it is made, so that an invalid one cannot exist."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            KNOBS[f.name].check(getattr(self, f.name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Which base model."""

    model: str = knob(
        STARTER_MODEL, "Model", "A Hugging Face id (owner/name), or the name of a folder in the workspace's models.", main=True
    )
    revision: str = knob("main", "Revision", "Branch, tag or commit of the model on the Hub.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("No model is chosen. Give a Hugging Face id (owner/name).", field="model")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(_Checked):
    """How the frozen base is stored and computed with (QLoRA paper, section 3)."""

    quant_type: str = knob(
        "nf4", "4-bit type", "NF4 suits normally distributed weights; the paper found it better than FP4.", choices=("nf4", "fp4")
    )
    double_quant: bool = knob(
        True, "Double quantization", "Quantizes the quantization constants too: saves 0.37 bits per parameter, costs nothing measurable."
    )
    compute_dtype: str = knob(
        "auto",
        "Compute dtype",
        "What weights are dequantized to for the matrix products. Auto looks at the hardware and logs why.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(_Checked):
    """The LoRA adapter, the only thing that is trained."""

    lora_r: int = knob(
        16,
        "LoRA rank",
        "Size of the adapter's bottleneck. The paper found quality independent of it; 8 to 64 is usual.",
        low=1,
        high=512,
        main=True,
    )
    lora_alpha: int = knob(
        16, "LoRA alpha", "The adapter's output is scaled by alpha / rank. The paper kept 16.", low=1, high=1024, main=True
    )
    lora_dropout: float = knob(
        0.05, "LoRA dropout", "Share of the adapter's inputs zeroed while training. Paper: 0.1 for 7B, 0.05 above.", low=0, high=0.9
    )
    target_modules: str = knob(
        "all-linear",
        "Target modules",
        "Where adapters go: all-linear (the paper: needed to match full fine-tuning), or module names with commas.",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Which rows, and what of them is learned."""

    data: str = knob("", "Data set", "bundled:NAME, a Hugging Face id (owner/name), or a file. Chosen on the Data tab.")
    prompt_format: str = knob(
        "tokenizer",
        "Prompt format",
        "The chat template rows are written in: the tokenizer's own, ChatML, or Guanaco's ### Human / ### Assistant.",
        choices=("tokenizer", "chatml", "guanaco"),
    )
    train_on: str = knob(
        "assistant",
        "Train on",
        "Which tokens count in the loss: every assistant turn, the last one only, or everything (the paper's OASST1 recipe).",
        choices=("assistant", "last", "everything"),
        main=True,
    )
    max_seq_len: int = knob(
        512, "Max length", "Longer rows are cut at the end. Memory grows with it.", unit="tokens", low=16, high=131072, main=True
    )
    held_out_share: float = knob(
        0.05,
        "Held-out share",
        "Part of the rows kept away from training, to measure what was learned and not memorised.",
        low=0,
        high=0.5,
        main=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(_Checked):
    """How the adapter is trained."""

    learning_rate: float = knob(
        2e-4, "Learning rate", "Peak step size. Paper: 0.0002 up to 13B, 0.0001 for 33B and 65B.", low=1e-8, high=1, main=True
    )
    num_train_epochs: float = knob(
        1.0, "Epochs", "Passes over the training rows. Ignored when max steps is set.", low=0.01, high=1000, main=True
    )
    max_steps: int = knob(
        0, "Max steps", "Optimizer steps to train for; 0 means by epochs.", unit="steps", low=0, high=10_000_000, main=True
    )
    micro_batch_size: int = knob(
        4, "Micro-batch", "Rows that go through the model at once. Memory grows with it.", unit="rows", low=1, high=1024, main=True
    )
    gradient_accumulation_steps: int = knob(
        4, "Accumulation", "Micro-batches per optimizer step. Effective batch = micro-batch x accumulation.", low=1, high=4096, main=True
    )
    lr_scheduler: str = knob(
        "constant",
        "Schedule",
        "How the learning rate moves after warm-up. The paper kept it constant.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_ratio: float = knob(0.03, "Warm-up", "Share of the steps over which the learning rate rises from 0. Paper: 0.03.", low=0, high=1)
    optimizer: str = knob(
        "paged_adamw_32bit",
        "Optimizer",
        "Paged AdamW moves its state to CPU memory when the GPU is short of it. On CPU nothing is paged.",
        choices=("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"),
    )
    adam_beta2: float = knob(0.999, "Adam beta2", "Memory of the squared gradients. Paper: 0.999.", low=0.5, high=0.99999)
    max_grad_norm: float = knob(0.3, "Max gradient norm", "Larger gradients are scaled down to it. Paper: 0.3.", low=0.001, high=1000)
    weight_decay: float = knob(0.0, "Weight decay", "Pull of the adapter towards zero at each step.", low=0, high=1)
    gradient_checkpointing: bool = knob(
        True, "Gradient checkpointing", "Recomputes activations in the backward pass: much less memory, about a third more time."
    )
    seed: int = knob(42, "Seed", "Fixes data order, held-out rows, dropout and the adapter's start.", low=0, high=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(_Checked):
    """When the run measures and saves."""

    eval_steps: int = knob(
        20, "Evaluate every", "Steps between two measurements of the held-out loss.", unit="steps", low=1, high=1_000_000
    )
    save_steps: int = knob(
        20, "Checkpoint every", "Steps between two checkpoints. A killed run keeps the newest.", unit="steps", low=1, high=1_000_000
    )
    save_total_limit: int = knob(2, "Checkpoints kept", "Older ones are deleted, so that the disk does not fill.", low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All a run is told. `values()` is its flat form: knob name -> value; names are unique over the parts."""

    preset: str = ""
    model: ModelConfig = field(default_factory=lambda: ModelConfig())
    quantization: QuantizationConfig = field(default_factory=lambda: QuantizationConfig())
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig())
    data: DataConfig = field(default_factory=lambda: DataConfig())
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig())
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig())

    @property
    def effective_batch(self) -> int:
        """Rows per optimizer step on one device."""
        return self.optimization.micro_batch_size * self.optimization.gradient_accumulation_steps

    def total_steps(self, train_rows: int) -> int:
        """Optimizer steps on one device, counted as transformers' Trainer counts them."""
        if self.optimization.max_steps:
            return self.optimization.max_steps
        batches = math.ceil(train_rows / self.optimization.micro_batch_size)
        steps_an_epoch = max(1, math.ceil(batches / self.optimization.gradient_accumulation_steps))
        return math.ceil(self.optimization.num_train_epochs * steps_an_epoch)

    def values(self) -> dict[str, Any]:
        """Flat: every knob's name and value."""
        return {name: getattr(getattr(self, k.section), name) for name, k in KNOBS.items()}

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with some knobs set; text is read as the knob's type. Raises UserError naming the knob."""
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            k = find_knob(name)
            by_section.setdefault(k.section, {})[name] = k.parse(value)
        return dataclasses.replace(self, **{s: dataclasses.replace(getattr(self, s), **v) for s, v in by_section.items()})

    def to_dict(self) -> dict[str, Any]:
        """The form that is written to `config.json`."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> RunConfig:
        """Inverse of `to_dict`. Raises UserError for a version that this app does not know."""
        if written.get("version") != VERSION:
            raise UserError(
                f"This run's config has version {written.get('version')!r}; this app reads version {VERSION}. Use the app that wrote it."
            )
        flat = {name: value for part, knobs in written.items() if part in PARTS for name, value in knobs.items()}
        return dataclasses.replace(RunConfig(), preset=str(written.get("preset", ""))).with_values(flat)


@dataclass(frozen=True, kw_only=True)
class Knob:
    """The declaration of one hyperparameter, read back from the parts of `RunConfig`."""

    name: str
    section: str
    kind: type
    default: Any
    label: str
    help: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    main: bool

    @property
    def title(self) -> str:
        """The label, with the unit where the label does not say it."""
        return f"{self.label} ({self.unit})" if self.unit and self.unit not in self.label.lower() else self.label

    def parse(self, value: Any) -> Any:
        """The value in the knob's type, from text, a form or YAML. Raises UserError when it has no such reading."""
        if self.kind is str:
            return "" if value is None else str(value).strip()
        if self.kind is bool:
            words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
            if str(value).strip().lower() in words:
                return words[str(value).strip().lower()]
            raise UserError(f"{self.name} is {value!r}: use true or false.", field=self.name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (self.kind is int and number != int(number)):
            shown = "empty" if value in (None, "") else repr(value)
            raise UserError(f"{self.name} is {shown}: it must be {self.requirement()}.", field=self.name)
        return int(number) if self.kind is int else number

    def check(self, value: Any) -> None:
        """Raise UserError when the value is outside the bounds or not one of the choices."""
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} is {value!r}: use one of {', '.join(self.choices)}.", field=self.name)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise UserError(f"{self.name} is {value}: it must be {self.requirement()}.", field=self.name)

    def requirement(self) -> str:
        """In words: what a number must be."""
        noun = "a whole number" if self.kind is int else "a number"
        shown = "{:,.0f}" if self.kind is int else "{:g}"
        bounds = f" from {shown.format(self.low)} to {shown.format(self.high)}" if self.low is not None and self.high is not None else ""
        return noun + bounds + (f" ({self.unit})" if self.unit else "")


PARTS: dict[str, type] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "optimization": OptimizationConfig,
    "schedule": ScheduleConfig,
}
KNOBS: dict[str, Knob] = {
    f.name: Knob(name=f.name, section=section, kind=get_type_hints(part)[f.name], default=f.default, **f.metadata)
    for section, part in PARTS.items()
    for f in dataclasses.fields(part)
}


def find_knob(name: str) -> Knob:
    """The knob of that name. Raises UserError with the nearest name when there is none."""
    if name in KNOBS:
        return KNOBS[name]
    near = difflib.get_close_matches(name, KNOBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else " The README lists all settings."
    raise UserError(f"There is no setting {name!r}.{hint}", field=name)


def settings_table() -> str:
    """All settings as a Markdown table, as the README shows it."""
    rows = ["| setting | default | range | what it does |", "|---|---|---|---|"]
    for k in KNOBS.values():
        bounds = ", ".join(k.choices) or (f"{k.low:,g} to {k.high:,g}" if k.low is not None and k.high is not None else "")
        default = str(k.default).lower() if k.kind is bool else str(k.default)
        unit = f" {k.unit}" if k.unit and bounds else ""
        rows.append(f"| `{k.name}` | {default or '(none)'} | {bounds}{unit} | {k.help} |")
    return "\n".join(rows)
