"""How good what was trained is. Knows nothing of Gradio."""
