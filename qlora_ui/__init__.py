"""QLoRA UI: 4-bit fine-tuning and chatting in a browser."""

__version__ = "0.1.0"
