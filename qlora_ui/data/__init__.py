"""Data: where rows come from, what they mean, what was kept. Knows nothing of torch or Gradio."""
