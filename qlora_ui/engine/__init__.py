"""The only rooms that import torch. They know nothing of Gradio."""

import logging
import warnings

# It says at its import already which kernels it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# All of it here: Python lets one thread at a time import a package, while transformers, which fills itself in lazily,
# breaks when two threads (the warm-up, a training, a chat) begin to import from it at once. Others write
# `from qlora_ui.engine import chat`, which waits for this; `from qlora_ui.engine.chat import ...` would not.
import bitsandbytes  # noqa: E402, F401
import peft  # noqa: E402, F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: E402, F401

# Libraries' notes to other programmers, which a person at the command line would take for a fault of theirs.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
