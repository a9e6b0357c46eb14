"""The only rooms that import torch. They know nothing of Gradio."""

import logging
import warnings

# Libraries' notes to other programmers, which a person at the command line would take for a fault of theirs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
