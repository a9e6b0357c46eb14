"""Questions to begin a conversation with, of the kinds that the Vicuna benchmark asks. Knows nothing of anything else."""

from __future__ import annotations

EXAMPLES = {
    "Generic": "How do I say no to a favour without sounding rude?",
    "Knowledge": "Why does the moon always show us the same side?",
    "Roleplay": "You are a lighthouse keeper in 1890. Tell me about last night's storm.",
    "Common sense": "I have wet hair and it is freezing outside. What should I do before I leave, and why?",
    "Fermi": "About how many piano keys are there in all of Paris? Show how you estimate it.",
    "Counterfactual": "What would cities look like if nobody had invented the lift?",
    "Coding": "Write a Python function that finds the longest run of equal characters in a string.",
    "Math": "A train goes 150 km in 1 hour 15 minutes. How fast is it, and how long does it take for 400 km?",
    "Writing": "Write a short letter that thanks a neighbour for watering the plants.",
}
"""The kind of question, and one of it."""
