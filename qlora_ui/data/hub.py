"""A data set on the Hugging Face Hub -> its rows as they stand. Knows nothing of what a row means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

from qlora_ui.data.files import Row
from qlora_ui.errors import UserError

CONVERTED = "refs/convert/parquet"
"""The revision under which the Hub keeps its own Parquet copy of a set: `subset/split/0000.parquet`."""

# The first answer is a few bytes: a Hub that does not give it in this time is not there. Opening a set reads file lists and a first block.
_FIRST_ANSWER_SECONDS, _OPENING_SECONDS = 4.0, 60.0

_PATH = r"[\w*][\w.*+=,()-]*(?:/[\w*][\w.*+=,()-]*)*"  # no part begins with a dot: never a way out of the repository
_REFERENCE = re.compile(
    rf"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?::(?P<subset>{_PATH}))?(?:@(?P<revision>{_PATH}))?(?:\#(?P<split>\w+(?:\.\w+)*))?",
    re.ASCII,
)
_FILE_NAME = re.compile(r".*\.(?:jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|bz2|xz|zip)", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """What a reference names: `owner/name[:subset][@revision][#split]`; the subset may be a file of it, or a pattern of files."""

    name: str
    subset: str = ""
    revision: str = ""
    split: str = ""

    @staticmethod
    def parse(text: str) -> HubSet:
        """Inverse of `str`. Raises UserError for anything else, also for `folder/rows.json`: that is a path."""
        match = _REFERENCE.fullmatch(text)
        if match is None or _FILE_NAME.fullmatch(match["name"]):
            raise _problem(
                f"{text!r} does not name a data set on the Hugging Face Hub: write owner/name, owner/name:subset or owner/name#split."
            )
        return HubSet(**{part: found or "" for part, found in match.groupdict().items()})

    def __str__(self) -> str:
        marked = {":": self.subset, "@": self.revision, "#": self.split}
        return self.name + "".join(mark + part for mark, part in marked.items() if part)

    @property
    def page(self) -> str:
        """Where a person reads about it and accepts its terms."""
        return f"https://huggingface.co/datasets/{self.name}"


def is_reference(text: str) -> bool:
    """Whether the text can name a data set on the Hub."""
    try:
        HubSet.parse(text)
    except UserError:
        return False
    return True


def _problem(message: str) -> UserError:
    return UserError(message, field="data")


def rows(reference: str) -> Iterator[Row]:
    """Rows of the named split, else of `train`, streamed: progress and Stop work row by row, and nothing of the set runs as code."""
    wanted = HubSet.parse(reference)
    try:
        stream = iter(_split(wanted, _open(wanted)))
        yield from _within(_OPENING_SECONDS, lambda: list(islice(stream, 1)))
        yield from stream
    except _failures() as error:
        raise _problem(_sentence(wanted, error)) from error


def splits(reference: str) -> tuple[str, ...]:
    """The names of the splits that the set (or the subset) has."""
    wanted = HubSet.parse(reference)
    try:
        return tuple(_open(wanted))
    except _failures() as error:
        raise _problem(_sentence(wanted, error)) from error


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns, or TimeoutError. Timeouts of the HTTP library count per address and per retry: the sum can be minutes."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that asked
            answer.set_exception(error)

    Thread(target=work, name="hub", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        raise error if answer.done() else TimeoutError(f"no answer within {seconds:g} seconds") from None


def _open(wanted: HubSet) -> Mapping[str, Any]:
    """The splits by name, not read yet."""
    from huggingface_hub import HfApi

    # load_dataset repeats a refused connection for 23 s before it says so; this one question, asked before all others, does not.
    about = _within(
        _FIRST_ANSWER_SECONDS,
        lambda: HfApi().dataset_info(wanted.name, revision=wanted.revision or None, timeout=_FIRST_ANSWER_SECONDS),
    )
    found = [file.rfilename for file in about.siblings or ()]
    if f"{wanted.name.split('/')[1]}.py" in found:
        raise _problem(
            f"{wanted.name} is made by a program, which is never run here: try {replace(wanted, revision=CONVERTED)}, the Hub's copy."
        )
    what = _what_to_load(wanted, found)

    import datasets

    # Its own defaults are 20 attempts, 5 s apart, without a word; and a second server is asked for what the files say themselves.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
    datasets.config.USE_PARQUET_EXPORT = False
    return _within(_OPENING_SECONDS, lambda: datasets.load_dataset(wanted.name, revision=about.sha, streaming=True, **what))


def _what_to_load(wanted: HubSet, found: Sequence[str]) -> dict[str, Any]:
    """The arguments for `load_dataset` that mean the subset: a name in the set's card, files, or a folder of the Hub's Parquet copy."""
    subset = wanted.subset
    if set("/*") & set(subset) or _FILE_NAME.fullmatch(subset):
        if not fnmatch.filter(found, subset):
            raise _problem(f"{wanted.name} has no file {subset}, only {_few(found)}: name one of them after the colon.")
        return {"data_files": subset}
    if wanted.revision != CONVERTED:
        return {"name": subset or None}
    parts = [file.split("/") for file in found if file.count("/") == 2]
    subsets = sorted({folder for folder, _, _ in parts})
    if not subset and len(subsets) == 1:
        subset = subsets[0]
    if subset not in subsets:
        raise _problem(_which_subset(wanted, subsets))
    # A split of over 5 GB is copied in part, under the name partial-train.
    return {"data_files": {split.removeprefix("partial-"): f"{subset}/{split}/*.parquet" for folder, split, _ in parts if folder == subset}}


def _split(wanted: HubSet, found: Mapping[str, Any]) -> Any:
    """The split that is wanted, images and sound left as the bytes they are."""
    name = wanted.split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if name not in found:
        names = list(found)
        raise _problem(f"{wanted} has no split {name!r}, only {_few(names)}: name one after a #, as in {replace(wanted, split=names[0])}.")
    split = found[name]
    for column, feature in (split.features or {}).items():
        if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
            split = split.cast_column(column, replace(feature, decode=False))
    return split


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])]) or "none"


def _which_subset(wanted: HubSet, subsets: Sequence[str]) -> str:
    if not subsets:
        return f"The Hugging Face Hub has no rows of {wanted}: choose another revision, or download its files and upload them."
    example = replace(wanted, subset=subsets[0])
    if wanted.subset:
        return f"{wanted.name} has no subset {wanted.subset!r}, only {_few(subsets)}: name one after the colon, as in {example}."
    return f"{wanted.name} has several subsets ({_few(subsets)}): name one after a colon, as in {example}."


def _failures() -> tuple[type[Exception], ...]:
    """All that the Hub, the network and a set's files can do wrong."""
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # what its HTTP library raises, whichever that is

    # StopIteration is what `datasets` lets out for a file without a row.
    return OSError, ValueError, TypeError, RuntimeError, ImportError, StopIteration, datasets.exceptions.DatasetsError, HTTPError


def _sentence(wanted: HubSet, error: Exception) -> str:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, reason = wanted.name, (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or "is a gated dataset" in reason:
        return f"{name} is gated: accept its terms at {wanted.page}, and start the app with HF_TOKEN set."
    if isinstance(error, RevisionNotFoundError):
        if wanted.revision == CONVERTED:
            return f"The Hugging Face Hub has no Parquet copy of {name}: download its files from {wanted.page} and upload them."
        return f"{name} has no revision {wanted.revision!r}: leave out what follows the @, or name a branch, a tag or a commit of it."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no data set {name} on the Hugging Face Hub, or it is private: check the name, or set HF_TOKEN."
    if status in (401, 403):
        return f"The Hugging Face Hub refuses {name} ({reason}): check HF_TOKEN, and whether {wanted.page} opens in a browser."
    if status == 429 or (status and status >= 500):
        return f"The Hugging Face Hub cannot answer for {name} now ({reason}): try again in a few minutes, or upload a file."
    if "Config name is missing" in reason or "not found. Available" in reason:
        return _which_subset(wanted, re.findall(r"'([^']+)'", str(error).split("vailable")[-1].split("Example")[0]))
    if "doesn't contain any data files" in reason or "No (supported) data files" in reason:
        return f"{name} holds no file of a kind that can be read: choose another set, or bring rows as JSON, CSV or Parquet."
    if isinstance(error, StopIteration):
        return f"{wanted} has no rows: choose another set, or another split."
    if isinstance(error, (OSError, HTTPError)) and not isinstance(error, (FileNotFoundError, HfHubHTTPError)):
        return f"The Hugging Face Hub cannot be reached for {name} ({reason}): check the connection, or upload a file."
    return f"{wanted} cannot be read from the Hugging Face Hub ({reason}): download its rows and upload them as a file."
