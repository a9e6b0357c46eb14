"""Where the layers of a model go: on one device where they fit, over all GPUs where they do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import tiny
import torch

from qlora_ui import jobs
from qlora_ui.config import OPTIMIZERS
from qlora_ui.engine import model as engine_model
from qlora_ui.engine import train as engine_train
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import Found, device_map
from qlora_ui.engine.train import train, training_arguments
from qlora_ui.events import Log, Step
from qlora_ui.runs import Workspace

CUDA: Any = SimpleNamespace(kind="cuda")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(count: int, free: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))

    return set_up


@pytest.mark.parametrize(
    ("count", "free", "where"),
    [(1, 48, {"": "cuda:0"}), (1, 1, {"": "cuda:0"}), (2, 48, {"": "cuda:0"}), (2, 12, "balanced"), (8, 12, "balanced")],
)
def test_a_model_goes_over_several_gpus_only_when_one_is_too_small(tmp_path: Path, gpus: Any, count: int, free: int, where: object) -> None:
    for number in range(2):  # 33 bytes of 16-bit weights are about 11 in 4 bits
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"x" * (16 + number))
    gpus(count, free)
    assert device_map(Found(folder=tmp_path, public_name="x", origin="x"), CUDA) == where


def test_without_a_gpu_everything_is_on_the_cpu(tmp_path: Path) -> None:
    assert device_map(Found(folder=tmp_path, public_name="x", origin="x"), SimpleNamespace(kind="cpu")) == {"": "cpu"}  # type: ignore[arg-type]


def test_a_second_gpu_that_is_not_needed_does_not_double_the_batch(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen_with_two_gpus(*told: Any, **more: Any) -> Any:
        arguments = training_arguments(*told, **more)
        assert arguments.n_gpu < 2  # it has counted them
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(engine_train, "training_arguments", seen_with_two_gpus)
    trainer = tiny.tiny_trainer(tiny.tiny_run(tiny_workspace, rows, micro_batch_size=2, gradient_accumulation_steps=3))
    assert trainer.get_train_dataloader().total_batch_size == 2 * 3
    assert trainer.args.n_gpu <= 1


def test_a_card_without_bfloat16_computes_in_float16_and_the_other_wish_is_told_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"is_available": True, "mem_get_info": (1, 2), "get_device_name": "Tesla T4"}
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert (detect().compute_dtype, detect().kind) == ("float16", "cuda")
    assert detect("bfloat16").reason == "chosen in the form, though Tesla T4 has no bfloat16 units"
    assert detect("float16").reason == "chosen in the form"


def losses(run: Any) -> list[float]:
    return [event.loss for event in tiny.events_of(run, Step)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "falcon", "opt", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_architecture_learns_on_a_gpu(workspace: Workspace, rows: Path, name: str, dtype: str) -> None:
    architectures.build(workspace.models / name, name)
    run = tiny.tiny_run(workspace, rows, model=name, max_steps=12, learning_rate=0.03, warmup_ratio=0, compute_dtype=dtype)
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    steps = losses(run)
    assert sum(steps[-2:]) < 0.9 * sum(steps[:2])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_gpus_learns_what_it_learns_on_one(workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.build(workspace.models / "llama", "llama")
    values = {"model": "llama", "compute_dtype": "float32", "max_steps": 3}
    one, spread = (tiny.tiny_run(workspace, rows, **values) for _ in range(2))
    jobs.execute(one, train)
    monkeypatch.setattr(engine_model, "device_map", lambda found, hardware: "balanced")
    jobs.execute(spread, train)
    assert detect("float32").kind == "cuda"
    assert losses(spread) == pytest.approx(losses(one), abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name.startswith("paged")])
def test_a_paged_optimizer_learns_on_a_gpu_and_pages_what_is_large(workspace: Workspace, rows: Path, optimizer: str) -> None:
    architectures.build(workspace.models / "llama", "llama")
    values = {"model": "llama", "optimizer": optimizer, "max_steps": 12, "warmup_ratio": 0}
    run = tiny.tiny_run(workspace, rows, **values)
    large = torch.zeros(512, 512, device="cuda")
    assert tiny.tiny_trainer(run).create_optimizer().get_state_buffer(large).is_paged
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-3), ("auto", 0.05)])
def test_packed_rows_learn_on_a_gpu_what_padded_ones_learn(workspace: Workspace, rows: Path, dtype: str, apart: float) -> None:
    """With the attention that keeps packed rows apart there, and the loss over trained tokens only."""
    tiny.tiny_model(workspace.models / tiny.NAME)
    values = {"compute_dtype": dtype, "max_steps": 4, "micro_batch_size": 4}
    packed, padded = (tiny.tiny_run(workspace, rows, packing=packing, **values) for packing in ("on", "off"))
    for run in (packed, padded):
        jobs.execute(run, train)
        assert run.state() == "finished", tiny.events_of(run)[-1]
    assert losses(packed) == pytest.approx(losses(padded), abs=apart)
    said = [event.text for event in tiny.events_of(packed, Log)]
    assert any(text.startswith("Rows are packed without padding") for text in said)
    assert "Logits are computed for trained tokens only, their loss in float32" in said
