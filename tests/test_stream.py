"""What a page asks is answered, also when one of Gradio's streams ends just then. In a real Chromium over two buttons."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
import pytest
from playwright.sync_api import Browser, Page, expect

from qlora_ui.ui.app import launch_options

pytestmark = pytest.mark.browser

END_COMES_LATE = """
    // The end of a stream reaches the page a little after the answer to the next question, as on a slow machine or over a relay.
    const ask = window.fetch;
    let asked = () => {};
    window.streams = 0;
    window.fetch = async (input, init) => {
        const answer = await ask(input, init);
        const url = input.url ?? String(input);
        if (url.includes("queue/join")) setTimeout(asked, 100);
        if (!url.includes("queue/data")) return answer;
        window.streams += 1;
        const [text, bytes] = [new TextDecoder(), new TextEncoder()];
        const late = new TransformStream({
            async transform(part, page) {
                for (const event of text.decode(part, { stream: true }).split(/(?<=\\n\\n)/)) {
                    if (event.includes('"close_stream"')) await new Promise((resolve) => (asked = resolve));
                    page.enqueue(bytes.encode(event));
                }
            },
        });
        return new Response(answer.body.pipeThrough(late), answer);
    };
"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with gr.Blocks(analytics_enabled=False) as blocks:
        told = gr.Textbox(label="told")
        for word in ("one", "two", "three"):
            gr.Button(word).click(lambda word=word: word, None, [told])
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    page = browser.new_page()
    page.add_init_script(f"(() => {{{END_COMES_LATE}}})()")
    page.goto(url)
    yield page
    page.close()
    blocks.close(verbose=False)


def test_a_question_that_is_asked_while_a_stream_ends_is_answered(page: Page) -> None:
    for streams, word in enumerate(("one", "two", "three"), start=1):
        page.get_by_role("button", name=word).click()
        expect(page.get_by_label("told")).to_have_value(word)
        assert page.evaluate("window.streams") == streams  # the one that had ended, and another in its place
