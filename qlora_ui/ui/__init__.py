"""The screens: one file a tab. They know nothing of torch and hold no state of a run."""
