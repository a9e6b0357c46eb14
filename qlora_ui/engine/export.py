"""A run's adapter, its merged model, or a folder that chats: made aside, and proven by reloading. Knows nothing of Gradio or the Hub.

What is reloaded is loaded as anybody else would, by plain transformers and PEFT, and must say what the trained model says.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open

from qlora_ui import exports
from qlora_ui.config import QuantizationConfig
from qlora_ui.engine import chat_alone, export_cards, tokens
from qlora_ui.engine.adapter import WEIGHTS
from qlora_ui.engine.export_merged import write_merged
from qlora_ui.engine.hardware import give_memory_back, is_out_of_memory, torch_dtype
from qlora_ui.engine.logits import Reference, Verification
from qlora_ui.engine.model import Found, find_here, quantization_config, watched_bars
from qlora_ui.engine.result import TRAINERS_OWN
from qlora_ui.engine.trained import Trained, find_base, load_trained
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.exports import Export
from qlora_ui.memory.forecast import quantized_bytes
from qlora_ui.memory.shapes import Linear
from qlora_ui.stopping import Cancelled

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]

SMALL_BYTES = 1_000_000  # card, picture, script
TABLE_BYTES = 2_000  # beside each matrix that is quantized: the values that its codes stand for, and their names
BITS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and the proof that it says what was trained."""

    path: Path
    kind: exports.Kind
    step: int
    base: str
    bytes: int
    verification: Verification


def export(wish: Export, emit: Emit, should_stop: ShouldStop) -> Exported:
    """Write what is wished for; it appears in one rename, complete and verified. Raises UserError, or Cancelled and leaves nothing."""

    def tell(event: Event) -> None:
        if should_stop():  # whoever says something holds nothing half done that is not aside
            raise Cancelled
        emit(event)

    tell(Log(text=wish.weights.why))
    if not (wish.weights.folder / WEIGHTS).is_file():
        raise UserError(f"{wish.weights.folder} has no {WEIGHTS}, and other formats can run code when loaded.", field="run")
    found = find_base(wish.run, tell, should_stop)
    tell(Log(text=f"Base: {found.public_name}, {found.origin}"))
    exports.check_space(wish.target, sizes(wish, found.folder).needed_bytes, f"The {wish.kind}")
    write = {"adapter": write_adapter, "merged": write_merged, "folder": write_folder}[wish.kind]
    try:
        with exports.complete_or_absent(wish.target) as place:
            verification = write(wish, found, place, tell, should_stop)
            if should_stop():
                raise Cancelled
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError("The memory does not suffice for this export. Close what else uses it, or use a larger machine.") from error
        raise
    finally:
        give_memory_back()
    return Exported(
        path=wish.target,
        kind=wish.kind,
        step=wish.weights.step,
        base=found.public_name,
        bytes=exports.bytes_in(wish.target),
        verification=verification,
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Room on the disk: for the export, and while it is made. A zip stands beside its folder, what is quantized again beside its source."""

    result_bytes: int
    needed_bytes: int


def sizes_here(wish: Export) -> Sizes | None:
    """What it takes, without asking a network; None where that depends on a base that is not on this machine."""
    if wish.kind != "merged":
        return sizes(wish, None)
    wanted = wish.run.config().model
    found = find_here(wanted.model, wish.run.facts().get("model_commit") or wanted.revision, wish.run.workspace.models)
    return sizes(wish, found.folder) if found else None


def sizes(wish: Export, base: Path | None) -> Sizes:
    """What it takes. A merged model is counted by the matrices in its base's folder."""
    adapter = sum(path.stat().st_size for path in wish.weights.folder.rglob("*") if path.is_file() and not path.name.endswith(TRAINERS_OWN))
    small = adapter + SMALL_BYTES
    if wish.kind != "merged" or base is None:
        return Sizes(result_bytes=adapter, needed_bytes=small + (adapter if wish.is_zip else 0))
    matrices = [shape for file in base.glob("*.safetensors") for shape in shapes(file)]
    in_16_bits = 2 * sum(map(prod, matrices))
    if not wish.quantize:
        return Sizes(result_bytes=in_16_bits, needed_bytes=in_16_bits + small)
    vocabulary = json.loads((base / "config.json").read_text("utf-8")).get("vocab_size")
    bits = QuantizationConfig(double_quant=wish.run.config().quantization.double_quant)
    saved = 0
    for shape in matrices:
        if len(shape) == 2 and vocabulary not in shape:  # embeddings and head stay as they are
            matrix = Linear(path="", reads="", in_features=shape[1], out_features=shape[0])
            saved += 2 * matrix.weights - sum(quantized_bytes(matrix, bits)) - TABLE_BYTES
    return Sizes(result_bytes=in_16_bits - saved, needed_bytes=2 * in_16_bits + small)


def shapes(file: Path) -> list[list[int]]:
    """Of all tensors in a safetensors file."""
    with safe_open(file, framework="pt") as weights:
        return [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - no dict


def write_adapter(wish: Export, found: Found, place: Path, emit: Emit, should_stop: ShouldStop) -> Verification:
    """The adapter with tokenizer, chat template and card, as a folder or a zip."""
    trained = load_trained(wish.run, wish.weights.folder, found, emit, should_stop)
    said = trained.reference()
    copy_adapter(wish, trained, place, emit)
    folder = _zipped(place) if wish.is_zip else place
    emit(Log(text="Verifying it, loaded with plain PEFT"))
    return said.compare(PeftModel.from_pretrained(trained.model.unload(), folder))


def copy_adapter(wish: Export, trained: Trained, folder: Path, emit: Emit) -> None:
    """What is in the run's adapter or checkpoint, without Trainer's own files, and a card of its own."""
    emit(Log(text="Copying the adapter"))
    shutil.copytree(wish.weights.folder, folder, ignore=lambda _, names: [name for name in names if name.endswith(TRAINERS_OWN)])
    if wish.repository:
        _hide_place(folder / "adapter_config.json")
    export_cards.write(wish, trained.found, folder)


def _hide_place(config: Path) -> None:
    """Of a base that is a folder of this machine, tell the public its last name only."""
    written = json.loads(config.read_text("utf-8"))
    base = Path(str(written.get("base_model_name_or_path")))
    if base.is_absolute():
        config.write_text(json.dumps({**written, "base_model_name_or_path": base.name}, indent=2) + "\n", "utf-8")


def _zipped(place: Path) -> Path:
    """Make a folder one zip file, and return a folder with what comes out of it."""
    folder = place.rename(place.with_name("adapter"))
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    shutil.rmtree(folder)
    with zipfile.ZipFile(place) as archive:
        archive.extractall(folder)
    return folder


def write_folder(wish: Export, found: Found, place: Path, emit: Emit, should_stop: ShouldStop) -> Verification:
    """Adapter, README and a script that chats without this app."""
    said = _write_script(wish, found, place, emit, should_stop)
    give_memory_back()
    emit(Log(text="Verifying it, loaded with its own script"))
    spec = importlib.util.spec_from_file_location("exported_chat", place / "chat.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    with watched_bars(emit, should_stop):
        model, _ = script.load(str(found.folder), found.trusted)
    return said.compare(model)


def _write_script(wish: Export, found: Found, place: Path, emit: Emit, should_stop: ShouldStop) -> Reference:
    """Everything in the folder; returns what the model in it must say."""
    trained = load_trained(wish.run, wish.weights.folder, found, emit, should_stop)
    place.mkdir()
    copy_adapter(wish, trained, place / "adapter", emit)
    shutil.copyfile(chat_alone.__file__, place / "chat.py")
    bits = quantization_config(wish.run.config().quantization, torch_dtype(trained.hardware))
    settings = {
        "base": found.public_name,
        "revision": found.commit or wish.run.config().model.revision,
        "encoder_decoder": trained.two_sided,
        "compute_dtype": trained.hardware.compute_dtype,
        "quantization": {name: getattr(bits, name) for name in BITS} if bits else None,
        "end_ids": tokens.end_ids(trained.tokenizer),
    }
    (place / "chat.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    export_cards.write_folder_readme(wish, found, place)
    return trained.reference()
