"""The live loss plot: one gr.HTML whose canvas fetches its own points. Knows nothing of runs, disk or torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

Curves = Callable[[str, int, int, int, int], dict[str, Any]]

SCRIPTS = [Path(__file__).with_name(f"loss_plot{part}.js") for part in ("", "_words", "_hands", "_tools")]

# Nothing in here depends on the value: Gradio compares the rendered text and leaves an unchanged one in the page alone,
# so the canvas, the zoom and an opened table survive every update.
TEMPLATE = """
<div class="tools">
  <div role="group" aria-label="Lines of the loss plot">
    <button type="button" class="raw" data-tool="raw" aria-pressed="true"><i></i>Training</button>
    <button type="button" class="smooth" data-tool="smooth" aria-pressed="true"><i></i>Smoothed</button>
    <button type="button" class="held" data-tool="held" aria-pressed="true"><i></i>Held-out</button>
  </div>
  <div role="group" aria-label="Axis and downloads of the loss plot">
    <button type="button" data-tool="log" aria-pressed="false" aria-label="Logarithmic loss axis">Log axis</button>
    <button type="button" data-tool="csv" aria-label="Download the points as CSV">CSV</button>
    <button type="button" data-tool="png" aria-label="Download the picture as PNG">PNG</button>
  </div>
</div>
<div class="frame">
  <canvas tabindex="0" role="img" aria-label="The loss curve appears here with the first step."></canvas>
  <p class="empty" aria-hidden="true" hidden>The loss curve appears here with the first step.</p>
  <button class="reset" type="button" hidden></button>
  <div class="tip" aria-hidden="true" hidden>
    <div class="at"></div>
    <div class="raw"><i></i><span>training</span><b></b></div>
    <div class="smooth"><i></i><span>smoothed</span><b></b></div>
    <div class="held"><i></i><span></span><b></b></div>
  </div>
  <span class="spoken" aria-live="polite"></span>
</div>
<div class="foot">
  <details><summary>Data as a table</summary>
    <div class="scroll" tabindex="0" role="region" aria-label="Points of the loss curve">
      <table>
        <caption></caption>
        <thead><tr><th scope="col">Step</th><th scope="col">Training loss</th><th scope="col">Smoothed</th>
        <th scope="col">Held-out loss</th></tr></thead>
        <tbody></tbody>
      </table>
    </div>
  </details>
  <span class="hint" aria-hidden="true">Drag to zoom. Arrow keys read the points.</span>
</div>
"""

# Blue and orange stay apart for every kind of colour blindness; `-ink` is the same hue dark or light enough for text.
# Everything has its place and height before the first point arrives, so nothing moves when it does.
STYLE = """
--loss-train: #2b6cb0; --loss-train-ink: #2b6cb0; --loss-held: #d97706; --loss-held-ink: #b45309; --loss-quiet: #5b6576;
.dark & { --loss-train: #6aaae8; --loss-train-ink: #85baf0; --loss-held: #f0a13a; --loss-held-ink: #f5b25c; --loss-quiet: #9aa6b8; }
box-sizing: border-box; padding: 14px 16px 10px; border: 1px solid var(--border-color-primary); border-radius: 10px;
background: var(--block-background-fill); color: var(--body-text-color); font-size: 12px; line-height: 16px;
font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums;
[hidden] { display: none; }
.tools, .tools div { display: flex; flex-wrap: wrap; gap: 6px; justify-content: space-between; }
.tools { margin-bottom: 14px; }
.tools button { display: inline-flex; align-items: center; gap: 6px; height: 26px; padding: 0 10px; border-radius: 999px; font: inherit;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); color: var(--loss-quiet); cursor: pointer; }
.tools button:hover { color: var(--body-text-color); }
.tools button[aria-pressed="true"] { color: var(--body-text-color); background: var(--background-fill-secondary);
  border-color: var(--loss-quiet); }
.tools button[aria-pressed="false"] i { background: none; box-shadow: inset 0 0 0 1px var(--loss-quiet); opacity: 1; }
button:focus-visible, summary:focus-visible { outline: 2px solid var(--loss-train); outline-offset: 2px; }
.frame { position: relative; height: 300px; }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: crosshair; touch-action: pan-y; user-select: none;
  border-radius: 4px; }
.empty { position: absolute; top: calc(50% + 1px); left: 50%; width: max-content; max-width: 85%; margin: 0; padding: 4px 16px;
  transform: translate(-50%, -50%); background: var(--block-background-fill); color: var(--loss-quiet); font-size: 14px;
  line-height: 20px; text-align: center; pointer-events: none; animation: appear 0.2s 0.25s both; }
@keyframes appear { from { opacity: 0; } }
.reset { position: absolute; top: -4px; right: 0; padding: 3px 10px; border: 1px solid var(--border-color-primary); border-radius: 999px;
  background: var(--block-background-fill); color: var(--loss-quiet); font: inherit; cursor: pointer; }
.reset:hover { color: var(--body-text-color); }
.tip { position: absolute; top: 0; left: 0; width: max-content; min-width: 172px; box-sizing: border-box;
  padding: 7px 10px 8px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--block-background-fill); box-shadow: 0 4px 14px rgb(0 0 0 / 0.09);
  pointer-events: none; line-height: 18px; }
.at { font-weight: 600; margin-bottom: 2px; }
.tip div:not(.at, [hidden]) { display: flex; align-items: center; gap: 7px; }
.tip span { flex: 1; color: var(--loss-quiet); white-space: nowrap; }
.tip b { font-weight: 600; }
i { flex: none; width: 10px; height: 2px; border-radius: 1px; background: var(--loss-train); }
.raw i { opacity: 0.4; }
.held i { width: 6px; height: 6px; margin: 0 2px; border-radius: 50%; background: var(--loss-held); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.foot { position: relative; margin-top: 4px; color: var(--loss-quiet); }
summary { width: fit-content; padding: 3px 4px; margin-left: -4px; border-radius: 4px; cursor: pointer; }
summary:hover { color: var(--body-text-color); }
.hint { position: absolute; top: 3px; right: 0; opacity: 0; transition: opacity 0.15s; pointer-events: none; }
.frame:hover + .foot .hint, .frame:has(canvas:focus-visible) + .foot .hint { opacity: 1; }
.scroll { max-height: 260px; overflow: auto; margin-top: 6px; border-top: 1px solid var(--border-color-primary); }
table { width: 100%; border-collapse: collapse; color: var(--body-text-color); }
caption { padding: 6px 8px; text-align: left; color: var(--loss-quiet); }
th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid var(--border-color-primary); }
thead th { position: sticky; top: 0; background: var(--block-background-fill); font-weight: 500; color: var(--loss-quiet); }
tbody th { font-weight: 400; }
@media (max-width: 640px) { padding: 12px 12px 8px; .frame { height: 220px; } .hint { display: none; } }
@media (hover: none) { .hint { display: none; } }
@media (prefers-reduced-motion: reduce) { .empty, .hint { animation: none; transition: none; } }
"""


def loss_plot(curves: Curves) -> gr.HTML:
    """The plot of one run. Its value is {"run": run id or "", "version": a number that changes when the run has news}.

    The page then asks `curves(run_id, rewinds, stride, count, held_out_count)` for the points that it lacks and gets the fields of
    a `curves.CurveDelta`. An unknown run is the business of `curves`.
    """

    def loss_points(cursor: list[Any]) -> dict[str, Any]:
        """What the page calls; Gradio hands several arguments over as one list."""
        run_id, *numbers = cursor
        rewinds, stride, count, held_out_count = (max(0, int(number)) for number in numbers)
        return curves(str(run_id), rewinds, stride, count, held_out_count)

    return gr.HTML(
        {"run": "", "version": 0},
        elem_id="loss-plot",
        html_template=TEMPLATE,
        css_template=STYLE,
        js_on_load="\n".join(script.read_text(encoding="utf-8") for script in SCRIPTS),
        server_functions=[loss_points],
        apply_default_css=False,
    )
