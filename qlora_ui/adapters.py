"""Adapters from elsewhere brought into the workspace: out of a zip, from the Hub. Knows nothing of torch or Gradio."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from stat import S_ISLNK

from qlora_ui import checkpoints, speakers
from qlora_ui.disk import telling_trouble
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.exports import size_words
from qlora_ui.runs import Workspace, write_json
from qlora_ui.speakers import Speaker

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WANTED = [CONFIG, WEIGHTS, "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
WANTED += ["*.jinja", "README.md"]
MOST_FILES = 1_000
MOST_TIMES = 20  # the size of the zip, and a little; weights hardly get smaller, tokenizers to an eighth
LITTLE_BYTES = 50_000_000
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # their weights belong to another base than the plain one


def named(wish: str, workspace: Workspace, emit: Callable[[Event], None], should_stop: Callable[[], bool], base: str = "") -> Speaker:
    """For whoever owns this machine: an adapter by its folder, its zip, its name in the workspace, else its owner/name on the Hub."""
    path = Path(wish).expanduser()
    if (path / CONFIG).is_file():
        return from_folder(path, workspace, base)
    if path.suffix == ".zip" and path.is_file():
        return from_zip(path, workspace, base)
    with contextlib.suppress(UserError):
        return speakers.of_adapter(workspace, _name_of(wish))
    if path.exists() or path.is_absolute() or path.suffix == ".zip":
        inside = f": choose {path / 'adapter'}" if (path / "adapter" / CONFIG).is_file() else ""
        raise UserError(f"{path} is no adapter's folder with {CONFIG}, and no zip of one{inside}.", field="adapter")
    return from_hub(wish, workspace, emit, should_stop, base)


def from_folder(path: Path, workspace: Workspace, base: str = "") -> Speaker:
    """A copy of the adapter in a folder. Raises UserError."""
    with _aside(workspace) as folder:
        _copy(path, folder)
        return _kept(folder, f"{_slug(path.name)}-{_digest(path / CONFIG)}{_digest(path / WEIGHTS)}", workspace, base)


def from_zip(path: Path, workspace: Workspace, base: str = "") -> Speaker:
    """The adapter in a zip file, complete or absent. Raises UserError for a file that holds none, or more than that.

    `base` is the model to put it on, in place of the one that its config names.
    """
    try:
        with _aside(workspace) as folder, zipfile.ZipFile(path) as archive:
            for member in _members(archive, path):
                with archive.open(member) as packed, (folder / PurePosixPath(member.filename).name).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            return _kept(folder, f"{_slug(path.stem)}-{_digest(path)}", workspace, base)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:  # the last for one with a password
        raise _refusal(f"{path.name} cannot be unpacked: {str(error).strip(' .')}. Make the zip anew") from error


def _members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The files of the adapter in the zip. Raises UserError for what no honest zip of an adapter holds."""
    members = archive.infolist()
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if member.filename.startswith("/") or ".." in parts or "\\" in member.filename or ":" in member.filename:
            raise _refusal(f"{path.name} holds {member.filename!r}, which leads out of its folder")
        if S_ISLNK(member.external_attr >> 16):
            raise _refusal(f"{path.name} holds {member.filename!r}, which is a link")
    unpacked, packed = sum(member.file_size for member in members), path.stat().st_size
    if len(members) > MOST_FILES or unpacked > MOST_TIMES * packed + LITTLE_BYTES:
        raise _refusal(f"{path.name} has {size_words(packed)}, but would become {size_words(unpacked)} in {len(members):,} files")
    configs = [PurePosixPath(member.filename) for member in members if PurePosixPath(member.filename).name == CONFIG]
    if len(configs) != 1:
        raise _refusal(f"{path.name} holds {len(configs)} files named {CONFIG}, and not one")
    beside = [member for member in members if PurePosixPath(member.filename).parent == configs[0].parent and not member.is_dir()]
    return [member for member in beside if _is_wanted(PurePosixPath(member.filename).name)]


def from_hub(wish: str, workspace: Workspace, emit: Callable[[Event], None], should_stop: Callable[[], bool], base: str = "") -> Speaker:
    """The adapter of that `owner/name` or `owner/name@revision` on the Hub. Raises UserError, or Cancelled and leaves nothing."""
    from qlora_ui.engine import model

    repository, _, revision = wish.strip().partition("@")
    fetched = model.download(repository, revision or "main", WANTED, emit, should_stop, what="adapter")
    with _aside(workspace) as folder:
        _copy(fetched, folder)
        return _kept(folder, _name_of(wish), workspace, base)


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED)


def _copy(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and _is_wanted(file.name):
            shutil.copyfile(file, folder / file.name)


def _name_of(wish: str) -> str:
    """What the folder of an adapter from the Hub is called."""
    return re.sub(r"[^\w.@-]", "--", wish.strip())


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "adapter"


def _digest(path: Path) -> str:
    """A few letters that tell apart what bears the same name."""
    return checkpoints.digest(path)[:8] if path.is_file() else ""


@contextlib.contextmanager
def _aside(workspace: Workspace) -> Iterator[Path]:
    """A new folder on the adapters' disk. It is gone at the end, with what was put aside into its parent, unless it was renamed."""
    home = speakers.adapters(workspace)
    with telling_trouble(workspace.root, "try again"):
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".bringing-") as room:
            folder = Path(room) / "adapter"
            folder.mkdir()
            yield folder


def _kept(folder: Path, name: str, workspace: Workspace, base: str) -> Speaker:
    """Make a checked folder an adapter of the workspace, in one rename, in the place of one that was brought before."""
    check(folder, workspace, base)
    target = speakers.adapters(workspace) / name
    if target.exists():
        target.rename(folder.with_name("replaced"))
    folder.rename(target)
    return speakers.of_adapter(workspace, name)


def check(folder: Path, workspace: Workspace, base: str = "") -> None:
    """Raise UserError for what is no plain LoRA adapter in safetensors; write the base that it is for into its config."""
    try:
        written = json.loads((folder / CONFIG).read_text("utf-8"))
        kind, start, named = written["peft_type"], written.get("init_lora_weights"), base.strip() or written["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(f"Its {CONFIG} is missing, or says not what it is ({error})") from error
    if kind != "LORA":
        raise _refusal(f"It is of the kind {kind}, and only LoRA can be used")
    if str(start).lower().startswith(CHANGES_THE_BASE):
        raise _refusal(f"It started as {start} and belongs to another base than the plain one. PEFT's save_pretrained can convert it")
    if not (folder / WEIGHTS).is_file():
        raise _refusal(f"It has no {WEIGHTS}, and other formats can run code when loaded")
    if base.strip():
        written["revision"] = None  # which was that of the other base
    write_json(folder / CONFIG, {**written, "base_model_name_or_path": _base_of(str(named), workspace)})


def _base_of(named: str, workspace: Workspace) -> str:
    """The base's id on the Hub, or the name of its folder in the workspace's models. Raises UserError for a folder that is not there."""
    if (workspace.models / Path(named).name / "config.json").is_file():
        return Path(named).name
    if named.count("/") == 1 and named[0] not in "/.~":
        return named
    raise UserError(
        f"The adapter names its base model {named!r}, which is not in {workspace.models}. Say which model on the Hub it is.", field="base"
    )


def _refusal(reason: str) -> UserError:
    return UserError(f"This adapter cannot be used. {reason}. Choose another.", field="adapter")
