"""What a chat completion may ask for, in OpenAI's words: read, checked, and the words of its answer. Knows nothing of HTTP or models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qlora_ui.data.formats import Message

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers

MAX_TOKENS = 1024
"""Where a request does not say: a model that does not find its end would else fill the context."""
MOST_STOPS = 4
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "store": False,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "modalities": ["text"],
}
"""What cannot be done here, and the value that does not ask for it. Any parameter may also be null."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Notes of the client to a service that keeps books; they change no answer."""
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


class Refused(Exception):
    """Why a request is not answered, with its HTTP status; `param` is what it is about, `code` a word for programs."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A request that can be answered. `sampling` are values of the engine's `Sampling`; `id` and `created` are those of its answer."""

    model: str
    messages: list[Message]
    sampling: dict[str, Any]
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """What each object of the answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def ending(self, last: Answers, stopped: bool) -> str:
        """Why the answer ended: the model's own end or a stop string, or all the tokens that there was room for."""
        room = min(self.sampling["max_new_tokens"], last.context_limit - last.context)
        return "length" if last.tokens >= room and not stopped else "stop"


def read_wish(body: bytes) -> Wish:
    """What a request's JSON asks for. Raises Refused."""
    try:
        asked = json.loads(body)
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused("The request holds half a character: a surrogate without its other half.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"The request is no JSON that can be read: {error}.") from error
    if not isinstance(asked, dict):
        raise Refused("The request must be a JSON object.")
    wish = {name: value for name, value in asked.items() if value is not None and name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        if name in wish and wish.pop(name) != neutral:
            raise Refused(f"{name} is not supported here. Leave it out.", param=name, code="unsupported_parameter")
    model, stream = _take(wish, "model", str, ""), _take(wish, "stream", bool, False)
    options = _take(wish, "stream_options", dict, {})
    include_usage = _take(dict(options), "include_usage", bool, False)
    if options and (not stream or set(options) - {"include_usage"}):
        raise Refused("stream_options may say include_usage, together with stream only.", param="stream_options")
    if not model:
        raise Refused("model is missing. List them with /v1/models.", param="model")
    messages, stop, sampling = _messages(wish.pop("messages", None)), _stop(wish.pop("stop", ())), _sampling(wish)
    if wish:
        raise Refused(f"{min(wish)} is not supported here. Leave it out.", param=min(wish), code="unsupported_parameter")
    return Wish(model=model, messages=messages, sampling=sampling, stop=stop, stream=stream, include_usage=include_usage)


def cut(text: str, stops: Sequence[str], ended: bool = False) -> tuple[str, bool]:
    """What may be shown of a text, and whether a stop string ends it there. What may be the beginning of one waits, unless it ended."""
    if found := [text.index(stop) for stop in stops if stop in text]:
        return text[: min(found)], True
    waits = 0 if ended else max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - waits], False


def usage(last: Answers) -> dict[str, int]:
    """Tokens that were read and written, an end token not counted."""
    return {"prompt_tokens": last.context, "completion_tokens": last.tokens, "total_tokens": last.context + last.tokens}


def _take(wish: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """The value of that name, which leaves the wish. Raises Refused for another kind of value."""
    value = wish.pop(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{name} is {value!r}: it must be of the kind {kind.__name__}.", param=name)
    return value


def _sampling(wish: dict[str, Any]) -> dict[str, Any]:
    """As the engine wants it. Its bounds are checked there."""
    kinds: dict[str, Any] = {name: (int if name in ("top_k", "seed") else (int, float)) for name in SAMPLING}
    given = {}
    for name, kind in kinds.items():
        if name in wish:
            value = wish.pop(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise Refused(f"{name} is {value!r}: it must be a {'whole ' if kind is int else ''}number.", param=name)
            given[name] = value
    limits = [_take(wish, name, int, MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens") if name in wish]
    if len(set(limits)) > 1:
        raise Refused("max_tokens and max_completion_tokens differ. Give one of them.", param="max_tokens")
    usual = {"temperature": 1.0, "top_p": 1.0, "seed": secrets.randbelow(2**32)}
    return {**usual, **given, "max_new_tokens": limits[0] if limits else MAX_TOKENS}


def _stop(asked: Any) -> tuple[str, ...]:
    stops = [asked] if isinstance(asked, str) else asked
    if not isinstance(stops, (list, tuple)) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(f"stop must be a text, or a list of up to {MOST_STOPS} texts, none of them empty.", param="stop")
    return tuple(stops)


def _messages(asked: Any) -> list[Message]:
    """The conversation up to the question. Raises Refused for what a chat template cannot say."""
    if not isinstance(asked, list) or not asked:
        raise Refused("messages is missing: it must be a list with at least one message.", param="messages")
    messages = [_message(place, message) for place, message in enumerate(asked)]
    if any(message.role == "system" for message in messages[1:]):
        raise Refused("Only the first message may be the system's.", param="messages")
    if messages[-1].role != "user":
        raise Refused("The last message must be the user's.", param="messages")
    return messages


def _message(place: int, asked: Any) -> Message:
    where = f"messages[{place}]"
    if not isinstance(asked, dict) or asked.get("role") not in ROLES:
        raise Refused(f"{where} must have a role: system, developer, user or assistant.", param=where)
    if more := sorted(name for name, value in asked.items() if name not in ("role", "content") and value):
        raise Refused(f"{where} has {more[0]!r}, which is not supported here.", param=where)
    content = asked.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise Refused(f"{where} has a content that is no text. Only text can be read here.", param=where)
    return Message(role=ROLES[asked["role"]], content="".join(map(str, texts)))
