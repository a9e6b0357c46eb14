"""What base and adapter answered to the same prompts, step by step under a slider. Knows nothing of disk or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui.progress import Progress
from qlora_ui.services import Services

SCRIPT = Path(__file__).with_name("samples.js")
LIVE = "live"
"""The value that means: the run that the page shows, as it goes."""

# As in plots.py, nothing in here depends on a value.
TEMPLATE = """
<div class="head"><b>Samples</b><input type="range" min="0" max="0" value="0" step="1" disabled aria-label="Step of the samples">
<output></output></div>
<div class="said" tabindex="0" role="region" aria-label="Sample answers"><p class="none">{none}</p></div>
""".format(
    none="The same prompts, answered by base and adapter: before the first step, at the end, and in between as often as "
    "“Samples every” says (Advanced; 0 means none)."
)
STYLE = """
padding: 10px 16px 12px; border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
color: var(--body-text-color); font-size: 13px; line-height: 18px; font-variant-numeric: tabular-nums;
.head { display: flex; align-items: center; gap: 12px; height: 24px; }
.head b { font-weight: 550; }
.head input { flex: 1 1 auto; min-width: 60px; accent-color: var(--primary-500); cursor: pointer; }
.head input:disabled { opacity: 0.4; cursor: default; }
output { min-width: 96px; text-align: right; color: var(--body-text-color-subdued); white-space: nowrap; }
.said { height: 190px; margin-top: 6px; overflow-y: auto; border-radius: 6px; }
.none { margin: 0; padding-top: 4px; color: var(--body-text-color-subdued); }
article { padding: 8px 0; border-top: 1px solid var(--border-color-primary); }
article:first-child { border-top: 0; }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 550; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 12px; margin-top: 4px; }
.pair > div { padding: 5px 10px; border-radius: 8px; background: var(--bubble); }
.pair > .adapter { background: var(--mark); }
span { display: block; font-size: 11px; line-height: 15px; color: var(--body-text-color-subdued); }
@media (max-width: 640px) { padding: 8px 12px; .said { height: 240px; } .pair { gap: 4px 6px; } .pair > div { padding: 5px 8px; } }
"""


def build(services: Services, run: str, elem_id: str, visible: bool = True) -> gr.HTML:
    """The samples of `run`, an id or LIVE. The page asks for a round once."""

    def rounds(cursor: list[Any]) -> dict[str, Any]:
        """What the page calls; Gradio hands several arguments over as one list."""
        run_id, known = cursor
        found = services.find(str(run_id))
        try:
            if found:
                return services.watch.look(found, lambda stand: stand.progress.answers.since([int(serial) for serial in known]))
        except FileNotFoundError:  # discarded since
            pass
        return Progress("").answers.since([])

    return gr.HTML(
        run,
        elem_id=elem_id,
        html_template=TEMPLATE,
        css_template=STYLE,
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        server_functions=[rounds],
        apply_default_css=False,
        visible=visible,
    )
