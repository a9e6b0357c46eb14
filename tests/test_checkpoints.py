"""Checkpoints that can be believed, told from those that cannot by what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from qlora_ui import checkpoints
from qlora_ui.checkpoints import SEAL, damage, newest_complete, put_aside, seal, thin
from qlora_ui.runs import Run, Workspace


def written(run: Run, step: int, *, sealed: bool = True) -> Path:
    folder = run.folder / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * step)
    (folder / "inner" / "optimizer.pt").write_bytes(b"moments")
    if sealed:
        seal(folder)
    return folder


@pytest.fixture
def run(workspace: Workspace) -> Run:
    return tiny.tiny_run(workspace, "rows.json")


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is gone": (lambda f: (f / "inner" / "optimizer.pt").unlink(), "inner/optimizer.pt is missing"),
    "a file is cut": (lambda f: overwrite(f / "adapter_model.safetensors", b"we"), "adapter_model.safetensors has 2 bytes and not 14"),
    "a bit is another": (lambda f: overwrite(f / "inner" / "optimizer.pt", b"momentz"), "inner/optimizer.pt is not what was written"),
    "never sealed": (lambda f: (f / SEAL).unlink(), "it was never finished"),
    "seal torn": (lambda f: overwrite(f / SEAL, b'{"a": [1'), f"its {SEAL} cannot be read"),
    "seal of another shape": (lambda f: overwrite(f / SEAL, b'["a"]'), f"its {SEAL} cannot be read"),
    "seal of other values": (lambda f: overwrite(f / SEAL, b'{"a": 1}'), f"its {SEAL} cannot be read"),
}


@pytest.mark.parametrize(("harm", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen_and_named_and_the_one_before_is_used(run: Run, harm: Callable[[Path], object], words: str) -> None:
    older, newer = written(run, 1), written(run, 2)
    assert damage(newer) == ""
    assert newest_complete(run) == newer
    harm(newer)
    assert damage(newer) == words
    assert newest_complete(run) == older
    assert put_aside(run, older) == [f"checkpoint-2 cannot be used: {words}"]
    assert checkpoints.all_of(run) == [older]
    assert (run.folder / "damaged-checkpoint-2").is_dir() == (words != "it was never finished")


def test_steps_are_counted_and_not_spelled(run: Run) -> None:
    for step in (9, 10, 100):
        written(run, step)
    (run.folder / "checkpoint-best").mkdir()
    (run.folder / "checkpoint-7").touch()
    assert [folder.name for folder in checkpoints.all_of(run)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


def test_without_a_complete_one_there_is_nothing_to_go_on_from(run: Run) -> None:
    assert newest_complete(run) is None
    written(run, 3, sealed=False)
    assert newest_complete(run) is None
    assert put_aside(run, None) == ["checkpoint-3 cannot be used: it was never finished"]
    assert checkpoints.all_of(run) == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, 0, [4, 3]), (2, 1, [4, 1]), (1, 1, [4, 1]), (1, 4, [4]), (3, 1, [4, 3, 1]), (9, 2, [4, 3, 2, 1]), (1, 0, [4])],
)
def test_the_oldest_go_but_never_the_newest_or_the_best(run: Run, keep: int, best: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        written(run, step)
    thin(run, keep, f"checkpoint-{best}")
    assert [checkpoints.step_of(folder) for folder in checkpoints.all_of(run)] == left


def test_what_a_kill_left_half_deleted_goes_too(run: Run) -> None:
    written(run, 1, sealed=False)
    written(run, 2)
    thin(run, 5, "")
    assert [folder.name for folder in checkpoints.all_of(run)] == ["checkpoint-2"]
