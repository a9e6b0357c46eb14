"""The memory planner: what a run will take, before it is started. Pure arithmetic: knows nothing of disk, torch or Gradio."""
