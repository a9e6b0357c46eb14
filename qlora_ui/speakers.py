"""Who can be talked to: a run, its checkpoints, an adapter from elsewhere, a bare base. Knows nothing of torch or Gradio."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from qlora_ui import checkpoints, labels
from qlora_ui.config import QuantizationConfig, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.runs import Run, Workspace

BASE_OF, ADAPTER, MODEL = "base-of:", "adapter:", "model:"  # what ids begin with; a run's has no such word
ADAPTER_NAME = re.compile(r"\w[\w.@-]*")
FORMATS = {"tokenizer": "its tokenizer's chat template", "guanaco": "Guanaco's ### Human and ### Assistant"}


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A base model in its bits, with the adapter of a folder on it or bare, and the words that it is asked in.

    These are the chat template of the tokenizer in the folder `vocabulary`, or of the base's own where that is None; with another
    `prompt_format` than "tokenizer", that one. By its `id` a speaker is found again, also after a restart; `name` tells it from all
    others here, `title` is what to call it elsewhere.
    """

    id: str
    name: str
    title: str
    model: str
    revision: str = "main"
    trust_remote_code: bool = False
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    adapter: Path | None = None
    vocabulary: Path | None = None
    prompt_format: str = "tokenizer"

    @property
    def base(self) -> Speaker:
        """The same without its adapter, asked in the same words."""
        return self if self.adapter is None else replace(self, id=BASE_OF + self.id, name=f"{self.name} · base", adapter=None)

    @property
    def stored(self) -> str:
        """The bits that its base is kept in."""
        bits = self.quantization.quant_bits
        return f"4 bits ({self.quantization.quant_type.upper()})" if bits == "4" else f"{bits} bits"

    @property
    def about(self) -> str:
        """What it is, in one line."""
        what = "An adapter on" if self.adapter else "The base model"
        return f"{what} {self.model} in {self.stored}. Prompt format: {FORMATS.get(self.prompt_format, self.prompt_format)}."


def find(workspace: Workspace, speaker_id: str) -> Speaker:
    """The speaker of that id; nothing outside the workspace is looked at. Raises UserError when there is none."""
    if speaker_id.startswith(BASE_OF):
        return find(workspace, speaker_id.removeprefix(BASE_OF)).base
    if speaker_id.startswith(MODEL):
        return of_model(workspace, speaker_id.removeprefix(MODEL))
    if speaker_id.startswith(ADAPTER):
        return of_adapter(workspace, speaker_id.removeprefix(ADAPTER))
    run_id, _, checkpoint = speaker_id.partition("/")
    run, step = workspace.get(run_id), checkpoints.NAME.fullmatch(checkpoint)
    if checkpoint and not step:
        raise UserError(f"{run_id} has no {checkpoint!r}. Write a checkpoint as {run_id}/checkpoint-STEP.", field="checkpoint")
    return of_run(run, int(step[1]) if step else None)


def all_of(workspace: Workspace) -> list[Speaker]:
    """Who is on this machine: each run and its complete checkpoints, newest first, adapters from elsewhere, models."""
    ways: list[Any] = []
    for run in workspace.all():
        sealed = [checkpoints.step_of(folder) for folder in checkpoints.all_of(run) if (folder / checkpoints.SEAL).exists()]
        ways += [partial(of_run, run, step) for step in ([None] if run.adapter.is_dir() else []) + sealed]
    ways += [partial(of_adapter, workspace, path.name) for path in sorted(adapters(workspace).glob("*"))]
    ways += [partial(of_model, workspace, path.parent.name.replace("--", "/")) for path in sorted(workspace.models.glob("*/config.json"))]
    speakers = []
    for way in ways:
        with contextlib.suppress(UserError, OSError, ValueError):  # deleted since, or damaged
            speakers.append(way())
    return speakers


def of_run(run: Run, step: int | None = None) -> Speaker:
    """A run's result, or its checkpoint of that step. Raises UserError when it has none."""
    folder = run.adapter if step is None else run.folder / f"checkpoint-{step}"
    if step is None and not folder.is_dir():
        raise UserError(f"{run.id} has no adapter yet. Choose a run that finished or was stopped after its first step.", field="run")
    if step is not None and not (folder / checkpoints.SEAL).exists():
        raise UserError(f"{run.id} has no complete checkpoint of step {step}. Choose another.", field="checkpoint")
    config, commit = _written(run, run.config_path.stat().st_mtime_ns)
    title = labels.title(run)
    return Speaker(
        id=run.id if step is None else f"{run.id}/{folder.name}",
        name=(run.id if title == run.name else f"{title} ({run.id})") + ("" if step is None else f" · step {step}"),
        title=title,
        model=config.model.model,
        revision=commit or config.model.revision,  # the very base that it was trained on
        trust_remote_code=config.model.trust_remote_code,
        quantization=config.quantization,
        adapter=folder,
        vocabulary=folder,
    )


@lru_cache(maxsize=10_000)
def _written(run: Run, changed: int) -> tuple[RunConfig, str]:
    """A run's config, and the commit of its base. Kept, because reading that of 500 runs takes a second."""
    return run.config(), run.facts().get("model_commit") or ""


def adapters(workspace: Workspace) -> Path:
    """Where adapters from elsewhere are, each in a folder as PEFT writes it."""
    return workspace.root / "adapters"


def of_adapter(workspace: Workspace, name: str) -> Speaker:
    """An adapter from elsewhere, on the base that its config names, in NF4 with double quantization. Raises UserError."""
    folder = adapters(workspace) / name
    try:
        if not ADAPTER_NAME.fullmatch(name):
            raise FileNotFoundError
        written = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        base, revision = of_model(workspace, written["base_model_name_or_path"]), str(written.get("revision") or "main")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"There is no adapter {name!r} in {adapters(workspace)}. Bring it first.", field="adapter") from error
    has_format = (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder)
    return replace(
        base,
        id=ADAPTER + name,
        name=name.replace("--", "/"),
        title=name.replace("--", "/"),
        revision=revision,
        adapter=folder,
        vocabulary=folder if any(folder.glob("tokenizer.*")) else None,
        prompt_format="guanaco" if "guanaco" in name.lower() and not has_format else "tokenizer",
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def bare(model: str) -> Speaker:
    """A base without an adapter, in NF4 with double quantization."""
    return Speaker(id=MODEL + model, name=f"{model} · base", title=model, model=model)


def of_model(workspace: Workspace, model: str) -> Speaker:
    """A bare base by its id on the Hub or its folder in the workspace. Raises UserError for a folder outside."""
    try:
        path = Path(model).expanduser()
        outside = path.exists() and not path.resolve().is_relative_to(workspace.root)
    except (OSError, RuntimeError, ValueError):  # no path at all: a name too long, a NUL, the home of nobody
        outside = False
    if outside or not model:
        raise UserError(f"The model {model!r} is outside the workspace. Put its folder into {workspace.models}.", field="model")
    return bare(model)
