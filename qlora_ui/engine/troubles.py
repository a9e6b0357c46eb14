"""What a person is told when an answer breaks off, and what is let go of then. Knows nothing of runs or Gradio."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from qlora_ui.engine.hardware import free_memory_gib, give_memory_back, is_out_of_memory
from qlora_ui.errors import UserError


def told(error: BaseException, let_go: Callable[[], None]) -> BaseException:
    """What to raise in the error's place: the error itself, unless there is a remedy.

    Memory that did not suffice is let go of, with what `let_go` can spare.
    """
    if is_out_of_memory(error):
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        traceback.clear_frames(error.__traceback__)
        let_go()
        give_memory_back()
        return UserError(
            f"The memory did not suffice ({said}); now {free_memory_gib():.1f} GiB are free. Close what else uses the memory, ask for "
            "fewer new tokens, start a new chat, or choose a smaller model."
        )
    if gpu_is_lost():
        said = str(error).strip().splitlines()[0].rstrip(".")
        return UserError(f"The GPU broke off and serves this process no more ({said}). Restart the app; nothing that was saved is lost.")
    return error


def gpu_is_lost() -> bool:
    """Whether CUDA refuses whatever it is asked, as it does from a failed assertion in a kernel to the end of the process."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
