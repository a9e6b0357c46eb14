"""The API for OpenAI's clients: the official one over a real server and a tiny NF4 model, and what is refused, over plain HTTP."""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
import uvicorn
from serving import free_port
from starlette.applications import Starlette
from training import Watched

import app as top
from qlora_ui import completions, openai_api, services
from qlora_ui.completions import Refused, cut, read_wish
from qlora_ui.engine.decoding import Answers, Sampling
from qlora_ui.runs import Run, Workspace

KEY = "key-of-this-test"
ASKED = [{"role": "user", "content": "Question 3: which word is 3?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def run(finished: Watched, tmp_path_factory: pytest.TempPathFactory) -> Run:
    workspace = Workspace.open(tmp_path_factory.mktemp("api") / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return Run(folder=Path(shutil.copytree(finished.run.folder, workspace.runs / finished.run.id)))


@pytest.fixture(scope="module")
def url(run: Run) -> Iterator[str]:
    """The app as `python app.py --api` launches it."""
    flags = argparse.Namespace(host="127.0.0.1", port=free_port(), share=False, open=False, api=True, demo=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(openai_api.KEY, KEY)
        page = top.launch(flags, services.build(run.workspace, services.WarmUp()))
    yield f"http://127.0.0.1:{flags.port}"
    page.close()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def said(client: openai.OpenAI, model: str, messages: Any = ASKED, **wish: Any) -> str:
    answer = client.chat.completions.create(model=model, messages=messages, **{**GREEDY, **wish})
    return answer.choices[0].message.content or ""


def test_the_official_client_gets_the_answer_that_the_chat_gives(client: openai.OpenAI, run: Run) -> None:
    answer = client.chat.completions.create(model=run.id, messages=ASKED, **GREEDY)
    made = services.build(run.workspace, services.WarmUp())
    from qlora_ui import speakers
    from qlora_ui.data.formats import Message

    speaker = speakers.find(run.workspace, run.id)
    *_, last = made.chat.reply([(speaker, [Message(**ASKED[0])])], Sampling(temperature=0, max_new_tokens=12))
    assert answer.choices[0].message.content == last.texts[0] != ""
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (last.context, last.tokens)
    assert answer.choices[0].finish_reason == ("length" if last.tokens == 12 else "stop")
    assert (answer.object, answer.model) == ("chat.completion", run.id)


def test_models_are_the_runs_their_checkpoints_and_bases(client: openai.OpenAI, run: Run) -> None:
    listed = {model.id for model in client.models.list()}
    assert {run.id, f"base-of:{run.id}", f"{run.id}/checkpoint-6", f"model:{tiny.NAME}"} <= listed
    assert client.models.retrieve(f"{run.id}/checkpoint-6").owned_by == "qlora-ui"
    assert said(client, run.id) != said(client, f"base-of:{run.id}")
    with pytest.raises(openai.NotFoundError, match="There is no model 'model:o/never-fetched' here"):
        said(client, "model:o/never-fetched")


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, run: Run) -> None:
    options = {"include_usage": True}
    *pieces, usage = client.chat.completions.create(model=run.id, messages=ASKED, stream=True, stream_options=options, **GREEDY)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said(client, run.id)
    assert len(pieces) > 4
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "length"]
    assert len({piece.id for piece in pieces}) == 1
    assert usage.choices == []
    assert usage.usage.completion_tokens == 12


def test_sampling_is_what_was_asked_for(client: openai.OpenAI, run: Run) -> None:
    hot = {"temperature": 1.5, "max_tokens": 16}
    assert said(client, run.id, seed=1, **hot) == said(client, run.id, seed=1, **hot) != said(client, run.id, seed=2, **hot)
    assert said(client, run.id, seed=1, **{**hot, "top_p": 0.0001}) == said(client, run.id, max_tokens=16)
    assert said(client, run.id, [{"role": "system", "content": "Say it all again."}, *ASKED]) != said(client, run.id)
    whole = said(client, run.id)
    assert said(client, run.id, [{"role": "user", "content": [{"type": "text", "text": ASKED[0]["content"]}]}]) == whole
    assert said(client, run.id, user="ada", metadata={"case": "7"}) == whole
    stop = whole[4:7]
    cut_off = client.chat.completions.create(model=run.id, messages=ASKED, stop=stop, **GREEDY).choices[0]
    assert (cut_off.message.content, cut_off.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = client.chat.completions.create(model=run.id, messages=ASKED, stop=[stop, "never"], stream=True, **GREEDY)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole[: whole.index(stop)]


def test_without_the_key_and_for_other_names_nothing_is_answered(url: str, run: Run) -> None:
    body = {"model": run.id, "messages": ASKED}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer é"}):
        refused = httpx.post(f"{url}/v1/chat/completions", json=body, headers={k: v.encode() for k, v in headers.items()})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/v1/models", headers={k: v.encode() for k, v in headers.items()}).status_code == 401
    known = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{url}/v1/models", headers={**known, "Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{url}/v1/embeddings", headers=known).json()["error"]["message"].startswith("There is no GET /v1/embeddings here.")
    broken = httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=known)
    assert (broken.status_code, broken.json()["error"]["message"][:22]) == (400, "The request is no JSON")
    assert httpx.get(url).status_code == 200  # the page is beside it


def test_a_conversation_too_long_and_a_value_out_of_bounds_are_errors_with_a_status(client: openai.OpenAI, run: Run) -> None:
    long = [{"role": role, "content": "a" * 300} for role in ("user", "assistant", "user")]
    with pytest.raises(openai.BadRequestError, match="longer than the model can read") as caught:
        said(client, run.id, long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature is -1: it must be from 0 to 10"):
        said(client, run.id, temperature=-1)


def test_while_something_trains_or_is_exported_the_answer_is_503_in_a_sentence(client: openai.OpenAI, run: Run, rows: Path) -> None:
    live = tiny.tiny_run(run.workspace, rows)
    with ExitStack() as held:
        held.callback(live.discard)
        with live.lock(), pytest.raises(openai.InternalServerError, match=f"{live.id} is training and needs the device") as caught:
            said(client, run.id)
        assert caught.value.status_code == 503
    with run.workspace.loan(), pytest.raises(openai.InternalServerError, match="An export needs the device") as caught:
        said(client, run.id)
    assert caught.value.status_code == 503
    assert said(client, run.id)


# A connection that is closed -----------------------------------------------------------------------------------------------


class Endless:
    """Answers for ever, and tells when its answer was closed; with `error`, breaks off after its first word."""

    def __init__(self, word: str = "word ", error: Exception | None = None) -> None:
        self.closed, self.word, self.error = threading.Event(), word, error

    def reply(self, *_: Any) -> Iterator[Answers]:
        try:
            for count in range(1, 1_000_000):
                yield Answers(texts=(self.word * count,), tokens=count, seconds=1, context=3, context_limit=1 << 30, left_out=0)
                if self.error:
                    raise self.error
                self.closed.wait(0.001)
        finally:
            self.closed.set()


@pytest.fixture
def serve(run: Run) -> Iterator[Any]:
    """Serves the API over a chat, and gives its address."""
    with ExitStack() as servers:

        def served(chat: Any) -> str:
            made = replace(services.build(run.workspace, services.WarmUp()), chat=chat)
            port = free_port()
            server = uvicorn.Server(uvicorn.Config(Starlette(routes=openai_api.routes(made, KEY)), port=port, log_level="error"))
            thread = threading.Thread(target=server.run)
            thread.start()
            servers.callback(thread.join)
            servers.callback(setattr, server, "should_exit", True)
            while not server.started:
                thread.join(0.01)
            return f"http://127.0.0.1:{port}/v1/chat/completions"

        yield served


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_ends_the_answer(serve: Any, run: Run, stream: bool) -> None:
    chat = Endless()
    wish: dict[str, Any] = {"json": {"model": run.id, "messages": ASKED, "stream": stream}, "headers": {"Authorization": f"Bearer {KEY}"}}
    if stream:
        with httpx.stream("POST", serve(chat), timeout=60, **wish) as answer:
            assert answer.status_code == 200
            assert next(answer.iter_lines()).startswith("data: {")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(serve(chat), timeout=httpx.Timeout(60, read=0.3), **wish)
    assert chat.closed.wait(10)


def test_a_client_that_reads_no_more_lets_others_have_the_device(serve: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "SEND_SECONDS", 0.2)
    chat = Endless("word " * 10_000)
    wish = {"model": run.id, "messages": ASKED, "stream": True}
    with httpx.stream("POST", serve(chat), json=wish, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as answer:
        assert answer.status_code == 200
        assert chat.closed.wait(10)


def test_an_answer_that_breaks_off_is_an_error_before_and_after_its_first_piece(serve: Any, run: Run) -> None:
    url = serve(Endless(error=IndexError("list index out of range")))
    wish: dict[str, Any] = {"model": run.id, "messages": ASKED}
    broken = httpx.post(url, json=wish, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert (broken.status_code, broken.json()["error"]["type"]) == (500, "server_error")
    client = openai.OpenAI(base_url=url.removesuffix("/chat/completions"), api_key=KEY, max_retries=0)
    heard = []
    with pytest.raises(openai.APIError, match="The answer broke off: list index out of range"):
        heard.extend(piece.choices[0].delta.content for piece in client.chat.completions.create(**wish, stream=True))
    text = httpx.post(url, json={**wish, "stream": True}, headers={"Authorization": f"Bearer {KEY}"}, timeout=60).text
    assert '"content": "word "' in text
    assert "[DONE]" not in text


def test_the_key_is_that_of_the_environment_or_one_that_is_made_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(openai_api.KEY, KEY)
    assert top.api_key() == (KEY, f"key: that of {openai_api.KEY}")
    monkeypatch.setenv(openai_api.KEY, "")
    made, words = top.api_key()
    assert len(made) >= 32
    assert words == f"key: {made}"
    assert top.api_key() == (made, f"key: that of {openai_api.KEY}")  # as a restart of the app finds it


# What may be asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 2}, "n is not supported here. Leave it out."),
        ({"tools": [{"type": "function"}]}, "tools is not supported here."),
        ({"logprobs": True}, "logprobs is not supported here."),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported here."),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported here."),
        ({"best_of": 3}, "best_of is not supported here."),
        ({"model": 3}, "model is 3: it must be of the kind str."),
        ({"model": ""}, "model is missing."),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"stream_options": {"include_usage": True}}, "together with stream only"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": ["a"] * 5}, "up to 4 texts"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number."),
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number."),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "Give one of them."),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must have a role"),
        ({"messages": [*ASKED, {"role": "system", "content": "x"}]}, "Only the first message"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "The last message must be the user's."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Only text can be read here."),
        ({"messages": [{"role": "user", "content": "x", "name": "Ada"}]}, "'name', which is not supported here."),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        read_wish(json.dumps({"model": "m", "messages": ASKED, **change}).encode())
    assert sentence in str(caught.value)
    assert caught.value.status == 400


def test_values_that_ask_for_nothing_are_as_if_left_out() -> None:
    asked = {"model": "m", "messages": ASKED, "n": 1, "tools": [], "stop": None, "presence_penalty": 0.0, "max_completion_tokens": 7}
    wish = read_wish(json.dumps(asked).encode())
    assert (wish.sampling["max_new_tokens"], wish.sampling["temperature"], wish.stop) == (7, 1.0, ())
    assert completions.read_wish(json.dumps({**asked, "max_completion_tokens": None}).encode()).sampling["max_new_tokens"] == 1024


def test_a_stop_string_is_found_wherever_it_falls_and_its_beginning_waits() -> None:
    assert cut("one two", ["two"]) == ("one ", True)
    assert cut("one tw", ["two", "wide"]) == ("one ", False)
    assert cut("one tw", ["two", "wide"], ended=True) == ("one tw", False)
    assert cut("a b a", ["b", "a b"]) == ("", True)
    assert cut("one", []) == ("one", False)
