"""Four small curves under the log, folded away: what each step says beside its loss. Knows nothing of disk or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui.progress import MORE_CURVES, Progress
from qlora_ui.services import Services

SCRIPT = Path(__file__).with_name("more_curves.js")
TITLES = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second", "memory_gib": "Memory"}

# As in plots.py, nothing in here depends on a value.
FIGURE = """
<figure data-curve="{name}">
  <figcaption>{title}<b>–</b></figcaption>
  <svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{title}: no step yet"><polyline points=""/></svg>
  <small>&nbsp;</small>
</figure>"""
FIGURES = "".join(FIGURE.format(name=name, title=TITLES[name]) for name in MORE_CURVES)
TEMPLATE = f"<details><summary>More curves</summary><div class='figures'>{FIGURES}</div></details>"
STYLE = """
--curve: #2b6cb0; --quiet: #5b6576;
.dark & { --curve: #6aaae8; --quiet: #9aa6b8; }
padding: 8px 16px; border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
color: var(--body-text-color); font-size: 12px; line-height: 16px; font-variant-numeric: tabular-nums;
summary { width: fit-content; padding: 3px 4px; margin-left: -4px; border-radius: 4px; color: var(--quiet); cursor: pointer; }
summary:hover { color: var(--body-text-color); }
summary:focus-visible { outline: 2px solid var(--curve); outline-offset: 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 14px 20px; padding: 8px 0 6px; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 6px; white-space: nowrap; color: var(--quiet); }
figcaption b { font-weight: 600; color: var(--body-text-color); }
svg { display: block; width: 100%; height: 64px; margin: 6px 0 4px; overflow: visible;
  border-bottom: 1px solid var(--border-color-primary); }
polyline { fill: none; stroke: var(--curve); stroke-width: 1.5; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
small { display: block; color: var(--quiet); font-size: 11px; white-space: nowrap; }
@media (max-width: 640px) { padding: 8px 12px; }
"""


def build(services: Services) -> gr.HTML:
    """The folded section. While it is open, its page asks for the points that it lacks whenever the run has news."""

    def more_points(cursor: list[Any]) -> dict[str, Any]:
        """What the page calls; Gradio hands several arguments over as one list."""
        run_id, rewinds, known = cursor
        has = {name: (int(stride), max(0, int(count))) for name, (stride, count) in known.items()}
        run = services.find(str(run_id))
        try:
            if run:
                return services.watch.look(run, lambda stand: stand.progress.more_since(int(rewinds), has))
        except FileNotFoundError:  # discarded since
            pass
        return Progress("").more_since(int(rewinds), has)

    return gr.HTML(
        "",
        elem_id="more-curves",
        html_template=TEMPLATE,
        css_template=STYLE,
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        server_functions=[more_points],
        apply_default_css=False,
    )
