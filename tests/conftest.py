"""What holds for every test: its own workspace, a Hub that refuses at once, no telemetry."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Bound but not listening, and kept: every connection is refused at once, and nobody else can be given this port.
_closed = socket.socket()
_closed.bind(("127.0.0.1", 0))

# Before anything imports huggingface_hub, which reads them once. Children inherit them.
_hf_home = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_closed.getsockname()[1]}"
os.environ["HF_HOME"] = _hf_home.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers have the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "QLORA_UI_HOME"):
    os.environ.pop(name, None)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plain `pytest` puts only this folder there

import tiny  # noqa: E402

from qlora_ui.config import STARTER_MODEL  # noqa: E402
from qlora_ui.runs import ENV, Workspace  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from training import Watched

settings.register_profile("house", deadline=None)  # two busy cores say nothing about an example
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Libraries' notes to each other, which pytest would repeat for every test."""
    for line in (
        "ignore:`torch.jit",
        "ignore:`is_gradient_checkpointing` is deprecated",
        "ignore:Paged optimizers are not supported on CPU",
    ):
        config.addinivalue_line("filterwarnings", line)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Each worker may hold a model, an app and a browser; those that need the GPU need it for themselves."""
    return 0 if "gpu" in config.option.markexpr.replace("not gpu", "") else min(os.cpu_count() or 1, 4)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with a browser or the starter model first: they take longest. Were one of them the last of all, a core would idle."""
    slow = {item.path for item in items if item.get_closest_marker("browser") or "starter_home" in item.fixturenames}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Every training collects garbage three times, each time over all that torch and transformers consist of: most of a tiny
    run's seconds. What is there once the tests are imported stays to the end, and need not be looked at again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """QLORA_UI_HOME of this test, not made yet."""
    folder = tmp_path / "home"
    monkeypatch.setenv(ENV, str(folder))
    return folder


@pytest.fixture
def workspace(home: Path) -> Workspace:
    """An empty workspace."""
    return Workspace.open(home)


@pytest.fixture
def tiny_workspace(workspace: Workspace) -> Workspace:
    """A workspace with the tiny model in it, under the name `tiny`."""
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace


@pytest.fixture
def starter_home(home: Path) -> Path:
    """A workspace that has the starter model, as tests/run.sh fetched it."""
    source = Path(os.environ.get("QLORA_UI_STARTER", "tests/.cache/models")) / STARTER_MODEL.replace("/", "--")
    if not source.is_dir():
        pytest.skip("the starter model is not here: run the suite with bash tests/run.sh, which fetches it")
    shutil.copytree(source, Workspace.open(home).models / source.name, copy_function=os.link)
    return home


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 12 Alpaca rows."""
    return tiny.tiny_rows(tmp_path / "rows.json")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the tests of one file: Playwright's loop would be in the way of others."""
    pytest.importorskip("playwright")
    from serving import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A workspace with the tiny model and a file of 12 rows, for the runs that are only looked at."""
    folder = tmp_path_factory.mktemp("train")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json")


@pytest.fixture(scope="session")
def finished(place: tuple[Workspace, Path]) -> Watched:
    """One finished run of 8 steps, for all tests that only look at it."""
    from training import watch

    return watch(*place)
