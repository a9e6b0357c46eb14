"""The only rooms that import torch. They know nothing of Gradio."""
