"""The model card that lies beside a saved adapter: for whoever finds the adapter elsewhere. Knows nothing of torch or Gradio.

It is read in public, so it names no folder of this machine: a model or a data set from this disk appears by its last name only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_ui.config import RunConfig
from qlora_ui.data import hub, sources
from qlora_ui.data.catalog import CATALOG
from qlora_ui.events import Event, HeldOut, Planned, Step

# What may hold a path, or is told above the table. A template lies beside the card in its own file.
NOT_LISTED = ("model", "revision", "data", "columns", "chat_template")


FROZEN = {
    "8": "Trained with LoRA: the base is frozen in 8 bits (LLM.int8)",
    "16": "Trained with LoRA: the base is frozen and not quantized",
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a card lies beside: what the Hub is told of it, and what a person reads first and last.

    `loading` makes the lines of Python that load it, of the base's name and commit.
    """

    front: Mapping[str, Any]
    title: str
    words: str
    loading: Callable[[str, str | None], list[str]]
    more: Sequence[str] = ()


def text(
    facts: Mapping[str, Any],
    config: RunConfig,
    events: Sequence[Event],
    adapter: Mapping[str, Any],
    form: Form | None = None,
    base_licence: str = "",
    picture: str = "",
) -> str:
    """The card, with the YAML front matter that the Hub reads. `facts` is the run's `config.json`, `events` all that it told,
    `adapter` is PEFT's `adapter_config.json`; `picture` is the file of a loss curve beside the card.
    """
    base, on_hub = base_name(facts, config)
    data, licence = data_name(config.data.data)
    form = form or adapter_form(config, str(facts.get("compute_dtype", "float32")), adapter)
    front: dict[str, Any] = dict(form.front)
    if on_hub:
        front["base_model"] = base
    if is_hub(config.data.data):
        front["datasets"] = [hub.HubSet.parse(config.data.data).name]
    if base_licence:
        front["license"] = base_licence
    commit = facts.get("model_commit")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {form.title} {code(base)}",
            "",
            form.words,
            "",
            f"- Base model: {code(base)}{f', commit {code(commit)}' if commit else ''}, licence {base_licence or 'not known'}",
            f"- Data: {code(data)}" + (f", licence {licence}" if licence else ", licence not known"),
            *losses(events),
            *(["", f"![Held-out and training loss over the steps]({picture})"] if picture else []),
            "",
            "## How to load it",
            "",
            "```python",
            *form.loading(base, commit),
            "```",
            *form.more,
            "",
            "## Settings",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {code(value)} |" for name, value in config.values().items() if name not in NOT_LISTED and value != ""),
            "",
            "## Library versions",
            "",
            *(f"- {name} {version}" for name, version in facts.get("versions", {}).items()),
            "",
        ]
    )


def adapter_form(config: RunConfig, dtype: str, adapter: Mapping[str, Any]) -> Form:
    """The card of an adapter."""
    q = config.quantization
    words = FROZEN.get(q.quant_bits, f"Trained with QLoRA: the base is frozen in {q.quant_type.upper()}")
    return Form(
        front={"library_name": "peft", "tags": [*(["qlora"] if "QLoRA" in words else []), "lora", "base_model:adapter"]},
        title="LoRA adapter for",
        words=f"{words}, the adapter is all that was learned.",
        loading=lambda base, commit: loading(base, commit, config, dtype, adapter),
    )


def base_name(facts: Mapping[str, Any], config: RunConfig) -> tuple[str, bool]:
    """What to call the base, and whether that is an id of the Hub."""
    name = str(facts.get("model_name") or config.model.model)
    local = Path(name).is_absolute() or facts.get("model_origin") == "a local folder"
    return (Path(name).name, False) if local else (name, True)


def data_name(reference: str) -> tuple[str, str]:
    """What to call the data set, and its licence where it is known."""
    known = {s.reference: s.licence for s in CATALOG.values()} | {f"bundled:{name}": s.licence for name, s in sources.BUNDLED.items()}
    on_hub = is_hub(reference)
    return (reference if on_hub else Path(sources.shown(reference)).name), known.get(reference, "")


def is_hub(reference: str) -> bool:
    """Whether this names a data set on the Hub, and nothing on this disk."""
    return hub.is_reference(reference) and not Path(reference).exists()


def losses(events: Sequence[Event]) -> list[str]:
    """What was read, and what came of it, as list items."""
    planned = [event for event in events if isinstance(event, Planned)]
    steps = [event for event in events if isinstance(event, Step)]
    measured = [event for event in events if isinstance(event, HeldOut)]
    lines = [f"- Rows: {event.train_rows:,} to train on, {event.held_out_rows:,} held out" for event in planned[-1:]]
    lines += [f"- Last training loss: {event.loss:.4f} (step {event.step:,})" for event in steps[-1:] if event.loss is not None]
    if measured:
        first, last = measured[0], measured[-1]
        lines.append(f"- Held-out loss: {first.loss:.4f} at step {first.step:,}, {last.loss:.4f} at step {last.step:,}")
    return lines


def loading(base: str, commit: str | None, config: RunConfig, dtype: str, adapter: Mapping[str, Any]) -> list[str]:
    """The lines of Python that load the adapter without this app."""
    q = config.quantization
    told = (f", revision={commit!r}" if commit else "") + (", trust_remote_code=True" if config.model.trust_remote_code else "")
    kind = "AutoModelForSeq2SeqLM" if adapter["task_type"] == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    four = f"bnb_4bit_quant_type={q.quant_type!r}, bnb_4bit_use_double_quant={q.double_quant}, bnb_4bit_compute_dtype=torch.{dtype}"
    bits = {"4": f"BitsAndBytesConfig(load_in_4bit=True, {four})", "8": "BitsAndBytesConfig(load_in_8bit=True)"}.get(q.quant_bits, "None")
    rows = "max(len(tokenizer), base.get_input_embeddings().num_embeddings)"
    room = [f"base.resize_token_embeddings({rows}, mean_resizing=False)  # for its new tokens"]
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer, BitsAndBytesConfig",
        "",
        'adapter = "."  # the folder of this card, or its id on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(adapter)  # with the chat template that it was trained in",
        f"bits = {bits}",
        f"base = {kind}.from_pretrained({base!r}{told}, quantization_config=bits, dtype=torch.{dtype})",
        *(room if adapter.get("trainable_token_indices") else []),
        "model = PeftModel.from_pretrained(base, adapter)",
    ]


def code(value: Any) -> str:
    """A value as Markdown shows it, whatever it holds: in a table cell of one line."""
    shown = str(value).replace("\n", " ").replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"
