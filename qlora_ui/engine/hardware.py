"""What this machine computes with, and which compute dtype suits it. Imports torch only when asked."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import psutil

from qlora_ui.errors import UserError
from qlora_ui.memory.devices import GIB, Device

if TYPE_CHECKING:
    import torch

LOOK_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device that trains and chats, and the dtype its matrix products run in, with the reason."""

    kind: Literal["cuda", "cpu"]
    name: str
    cores: int
    memory_total_gib: float
    memory_free_gib: float
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    reason: str

    def chip(self) -> str:
        """One line for the page's header."""
        if self.kind == "cuda":
            return f"{self.name} · {self.memory_free_gib:.1f} of {self.memory_total_gib:.1f} GB free · {self.compute_dtype}"
        return f"CPU · {self.cores} cores · {self.memory_total_gib:.0f} GB · {self.compute_dtype}"

    def device(self) -> Device:
        """What the memory planner wants to know of it; the memory is what was free when it was looked at."""
        return Device(
            name=self.name if self.kind == "cuda" else "CPU",
            kind=self.kind,
            memory_bytes=int(self.memory_free_gib * GIB),
            compute_dtype=self.compute_dtype,
        )


def detect(wish: str = "auto") -> Hardware:
    """Look at the machine. `wish` is the run's compute_dtype; raises UserError when the device cannot serve it."""
    import torch

    cuda = torch.cuda.is_available()
    dtype, reason = _dtype_for_cuda() if cuda else _dtype_for_cpu()
    if wish == "float16" and not cuda:
        raise UserError("compute_dtype is 'float16', but there is no GPU here: use auto, float32 or bfloat16.", field="compute_dtype")
    if wish != "auto":
        emulated = cuda and (wish, dtype) == ("bfloat16", "float16")
        reason = "chosen in the form" + (f", though {torch.cuda.get_device_name()} has no bfloat16 units" if emulated else "")
        dtype = wish
    free, total = torch.cuda.mem_get_info() if cuda else (psutil.virtual_memory().available, psutil.virtual_memory().total)
    return Hardware(
        kind="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        memory_total_gib=total / GIB,
        memory_free_gib=free / GIB,
        compute_dtype=dtype,  # type: ignore[arg-type]
        reason=reason,
    )


def torch_dtype(hardware: Hardware) -> torch.dtype:
    """The compute dtype as torch names it."""
    import torch

    dtype: torch.dtype = getattr(torch, hardware.compute_dtype)
    return dtype


def autocast(hardware: Hardware) -> torch.autocast:
    """Within this, products of float32 and the compute dtype are made in the compute dtype, as Trainer's steps are."""
    import torch

    return torch.autocast(hardware.kind, dtype=torch_dtype(hardware), enabled=hardware.compute_dtype != "float32")


def memory_gib() -> float:
    """Memory in use: allocated on the GPU, else resident in this process."""
    import torch

    return (torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss) / GIB


class MemoryGrowth:
    """Within it, the most that this process takes beyond what it had: as torch allocates on a GPU, else resident.

    Resident memory is looked at every few milliseconds. The C library keeps much of what was freed before; on Linux it is asked
    to hand that back first, else what is taken of it would not be seen.
    """

    def __enter__(self) -> MemoryGrowth:
        import torch

        give_memory_back()
        self._cuda = torch.cuda if torch.cuda.is_available() else None
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # not every C library has it
        self._before = self._most = int(memory_gib() * GIB)
        self._over = threading.Event()
        self._looker = threading.Thread(target=self._look, name="memory", daemon=True)
        if not self._cuda:
            self._looker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._cuda:
            self._most = self._cuda.max_memory_allocated()
        else:
            self._looker.join()

    def _look(self) -> None:
        process = psutil.Process()
        while not self._over.wait(LOOK_SECONDS):
            self._most = max(self._most, process.memory_info().rss)

    @property
    def peak_bytes(self) -> int:
        """After it."""
        return self._most - self._before


def free_memory_gib() -> float:
    """Memory that could still be used: on the GPU with what torch has set aside for itself, else what other programs leave."""
    import torch

    if not torch.cuda.is_available():
        return float(psutil.virtual_memory().available) / GIB
    return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or in the machine's memory."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # The driver's own words, which bitsandbytes' paged memory and CUDA's other libraries pass on.
    return known or (isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or "out of memory" in str(error).lower()))


def give_memory_back() -> None:
    """Collect what nobody refers to any more (Trainer and its callbacks refer to each other) and empty the GPU's cache."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype_for_cuda() -> tuple[str, str]:
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", f"{torch.cuda.get_device_name()} has bfloat16 units: as fast as float16, with the range of float32"
    return "float16", f"{torch.cuda.get_device_name()} has no bfloat16 units; float16 is used with loss scaling"


@lru_cache(maxsize=1)
def _dtype_for_cpu() -> tuple[str, str]:
    """Time a matrix product of a small model's size in both dtypes: flags do not tell what the libraries make of them."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows, weights = operands[dtype]
        start = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        return time.perf_counter() - start

    dtypes = (torch.float32, torch.bfloat16)
    operands = {dtype: (torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)) for dtype in dtypes}
    # In turns, and the quickest of each counts: other work on the machine can only make a round slower.
    rounds = [[seconds(dtype) for dtype in dtypes] for _ in range(25)]
    gain = min(plain for plain, _ in rounds) / min(short for _, short in rounds)
    if gain >= 1.25:
        return "bfloat16", f"this CPU multiplies matrices {gain:.1f} times as fast in bfloat16 as in float32 (timed)"
    return "float32", f"this CPU gains too little from bfloat16: {gain:.2f} times the speed of float32 (timed)"
