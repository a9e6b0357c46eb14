"""The writing system of a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.data.scripts import of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello there.", "Latin"),
        ("Grüße aus Köln", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("你好，世界", "Chinese"),
        ("日本語を話します", "Japanese"),
        ("안녕하세요", "Korean"),
        ("مرحبا", "Arabic"),
        ("1 + 2 = 3", "none"),
        ("", "none"),
    ],
)
def test_the_script_is_that_of_most_letters(text: str, script: str) -> None:
    assert of(text) == script


@given(st.text())
def test_any_text_has_a_word_for_its_script(text: str) -> None:
    assert of(text)
