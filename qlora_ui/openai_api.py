"""Chat completions in the words of OpenAI's clients, answered by whoever can be talked to here. Knows nothing of Gradio or torch.

What a request asks for is done or refused in a sentence, never ignored. Whoever has the key may ask.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from qlora_ui import speakers
from qlora_ui.completions import Refused, Wish, cut, read_wish, usage
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.speakers import Speaker

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

KEY = "QLORA_UI_API_KEY"
THREADS = 16
"""Requests that are worked on at once; more wait without a thread. Answers come one after the other all the same."""
SEND_SECONDS = 30.0
CLIENT_GONE = 499
log = logging.getLogger(__name__)


def routes(services: Services, key: str) -> list[Route]:
    """What the app answers under /v1 to whoever gives the key."""
    api = Api(services)
    return [
        Route("/v1/models", guarded(key, api.models)),
        Route("/v1/models/{model:path}", guarded(key, api.model)),
        Route("/v1/chat/completions", guarded(key, api.completions), methods=["POST"]),
        Route("/v1/{other:path}", guarded(key, unknown), methods=["GET", "POST", "DELETE"]),
    ]


def guarded(key: str, handler: Handler) -> Handler:
    """The handler for requests with the key; what it refuses becomes an error as OpenAI's clients read it."""
    expected = f"Bearer {key}".encode()

    async def answer(request: Request) -> Response:
        if not secrets.compare_digest(request.headers.get("Authorization", "").encode(), expected):
            return failure(Refused("The API key is missing or wrong. Give the one that the app showed when it started.", 401))
        try:
            return await handler(request)
        except Refused as error:
            return failure(error)

    return answer


def failure(error: Refused) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


async def unknown(request: Request) -> Response:
    """All else that OpenAI offers."""
    raise Refused(f"There is no {request.method} {request.url.path} here. Use POST /v1/chat/completions or GET /v1/models.", 404)


class Api:
    """The endpoints over these services."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._threads = anyio.CapacityLimiter(THREADS)

    async def models(self, request: Request) -> Response:
        """All speakers of this machine, each also as its base alone."""
        found = await self._in_thread(self._speakers)
        return JSONResponse({"object": "list", "data": [described(speaker) for speaker in found.values()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(described(await self._speaker(request.path_params["model"])))

    async def completions(self, request: Request) -> Response:
        """One answer, whole or in pieces. What goes wrong before its first token has a status of its own."""
        wish = read_wish(await request.body())
        spoken = self._spoken(request, await self._speaker(wish.model), wish)
        first = await anext(spoken, None)
        if first is None:
            return Response(status_code=CLIENT_GONE)
        if wish.stream:
            return Events(pieces(wish, first, spoken))
        last, stopped = first, False
        async with aclosing(spoken):
            async for last in chained(first, spoken):
                if stopped := cut(last.texts[0], wish.stop)[1]:
                    break
        message = {"role": "assistant", "content": cut(last.texts[0], wish.stop, ended=True)[0]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": wish.ending(last, stopped)}
        return JSONResponse({**wish.head("chat.completion"), "choices": [choice], "usage": usage(last)})

    async def _spoken(self, request: Request, speaker: Speaker, wish: Wish) -> AsyncGenerator[Answers, None]:
        """The answer as it grows. A client that goes away ends it at its next token. Raises Refused."""
        growing = self._reply(speaker, wish)
        try:
            while (answers := await self._in_thread(next, growing, None)) is not None:
                if await request.is_disconnected():
                    return
                if answers.left_out:
                    words = "The conversation is longer than the model can read with room for an answer. Shorten it."
                    raise Refused(words, param="messages", code="context_length_exceeded")
                if answers.context:  # before, it tells what is waited for
                    yield answers
        except UserError as error:
            busy = await self._in_thread(self._services.workspace.is_busy)
            raise Refused(str(error), 503 if busy else 400, param=error.field or None) from error
        finally:
            with anyio.CancelScope(shield=True):
                await self._in_thread(growing.close)

    def _reply(self, speaker: Speaker, wish: Wish) -> Generator[Answers, None, None]:
        from qlora_ui.engine import decoding

        try:
            yield from self._services.chat.reply([(speaker, wish.messages)], decoding.Sampling(**wish.sampling))
        except UserError:
            raise
        except Exception as error:  # our bug, or the device's: the next answer works
            log.exception("An answer broke off")
            raise Refused(f"The answer broke off: {error}. Ask again, or ask another model.", 500) from error

    async def _speaker(self, name: str) -> Speaker:
        """Raises Refused for one that is not on this machine: nobody is asked for a model that a request names."""
        found = await self._in_thread(self._speakers)
        if name not in found:
            raise Refused(f"There is no model {name!r} here. List them with /v1/models.", 404, param="model", code="model_not_found")
        return found[name]

    def _speakers(self) -> dict[str, Speaker]:
        found = speakers.all_of(self._services.workspace)
        return {one.id: one for speaker in found for one in (speaker, speaker.base)}

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._threads)


class Events(StreamingResponse):
    """Server-sent events whose source is closed in any case, also when its client left while a piece was on its way, or reads no more.

    Others wait for the answer to end.
    """

    def __init__(self, source: AsyncGenerator[str, None]) -> None:
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(SEND_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.warning("An answer was ended: its client took no piece of it for %s seconds", SEND_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


async def pieces(wish: Wish, first: Answers, spoken: AsyncGenerator[Answers, None]) -> AsyncGenerator[str, None]:
    """The answer piece by piece, as server-sent events."""

    def piece(delta: dict[str, str], ending: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ending}
        return event({**wish.head("chat.completion.chunk"), "choices": [choice], **({"usage": None} if wish.include_usage else {})})

    said, last, stopped = "", first, False
    yield piece({"role": "assistant", "content": ""})
    try:
        async with aclosing(spoken):
            async for last in chained(first, spoken):
                text, stopped = cut(last.texts[0], wish.stop)
                if text[len(said) :]:
                    yield piece({"content": text[len(said) :]})
                    said = text
                if stopped:
                    break
    except Refused as error:  # too late for a status
        yield event(error.body())
        return
    if rest := cut(last.texts[0], wish.stop, ended=True)[0][len(said) :]:
        yield piece({"content": rest})
    yield piece({}, wish.ending(last, stopped))
    if wish.include_usage:
        yield event({**wish.head("chat.completion.chunk"), "choices": [], "usage": usage(last)})
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def chained(first: Answers, others: AsyncIterator[Answers]) -> AsyncIterator[Answers]:
    yield first
    async for answers in others:
        yield answers


def described(speaker: Speaker) -> dict[str, Any]:
    """A speaker as OpenAI lists a model."""
    made = int(speaker.adapter.stat().st_mtime) if speaker.adapter and speaker.adapter.exists() else 0
    return {"id": speaker.id, "object": "model", "created": made, "owned_by": "qlora-ui"}
