"""How the page looks: Gradio's theme tokens and the project's style sheet."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS = Path(__file__).resolve().parents[2] / "assets" / "style.css"
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
ACCENT = gr.themes.Color(
    name="teal",
    c50="#eefaf8",
    c100="#d3f2ec",
    c200="#a9e4da",
    c300="#74cfc1",
    c400="#41b2a3",
    c500="#24958a",
    c600="#147a71",
    c700="#11625c",
    c800="#124e4b",
    c900="#13413f",
    c950="#042726",
)


def theme() -> gr.themes.Base:
    """One accent, quiet greys, system fonts."""
    return gr.themes.Base(
        primary_hue=ACCENT,
        neutral_hue=gr.themes.colors.slate,
        font=SYSTEM_FONTS,
        font_mono=MONO_FONTS,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0e1420",
        body_text_color_subdued="#5b6576",
        body_text_color_subdued_dark="#9aa6b8",
        block_info_text_color="#5b6576",
        block_info_text_color_dark="#9aa6b8",
        block_background_fill_dark="#161d2b",
        block_border_width="1px",
        block_shadow="none",
        block_label_text_weight="500",
        block_title_text_weight="500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="#1d2636",
        button_secondary_background_fill_hover_dark="#273246",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        checkbox_label_background_fill="transparent",
        checkbox_label_background_fill_dark="transparent",
        checkbox_label_background_fill_hover="*neutral_100",
        checkbox_label_background_fill_hover_dark="#273246",
        input_background_fill="white",
        input_background_fill_dark="#0e1420",
    )
