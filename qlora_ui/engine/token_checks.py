"""Mistakes with the tokens that begin, end and fill rows, found before training and told with a remedy. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message, Role
from qlora_ui.engine.tokens import RAW_TEXT, TokenRow, token_rows, whole, written
from qlora_ui.errors import UserError

LOOKED_AT = 20  # rows; a template does the same to all of them


def troubles(tokenizer: Any, conversations: Sequence[Conversation], train_on: str, generation_ends: Sequence[int] = ()) -> list[str]:
    """Sentences on what the model would learn wrongly from these rows, or would do wrongly after; none when all is right.

    `generation_ends` are the tokens at which other tools stop this model.
    """
    few = conversations[:LOOKED_AT]
    rows = token_rows(tokenizer, [written(tokenizer, row.messages, train_on) for row in few])
    answers = _answers(tokenizer, few)
    found = [_beginnings(tokenizer, rows), _ends(tokenizer, answers), _other_ends(tokenizer, answers, generation_ends)]
    if any(row.messages[0].role == "user" for row in few):
        found.append(_own_system_prompt(tokenizer))
    return [sentence for sentence in found if sentence]


def padding(tokenizer: Any) -> str:
    """What shorter rows are filled up with, and why that is never learned."""
    pad = tokenizer.pad_token
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return f"Rows are padded with {pad}"
    return (
        f"Rows are padded with {pad}, which ends turns too. Padding is masked by its place, so the end is learned and the padding is not; "
        "new_tokens pad=<|pad|> would give it a token of its own"
    )


def _answers(tokenizer: Any, conversations: Sequence[Conversation]) -> list[TokenRow]:
    """The rows with the assistant's turns marked, whatever is trained on; none where a template hides whose text it is."""
    try:
        turns = [row.messages for row in conversations if row.messages[0].role != RAW_TEXT]
        return token_rows(tokenizer, [written(tokenizer, messages, "assistant") for messages in turns])
    except UserError:  # it rewrites earlier turns: that is an error only where the assistant's turns have to be found
        return []


def _beginnings(tokenizer: Any, rows: Sequence[TokenRow]) -> str:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ""
    if any(row.ids[:2].tolist() == [bos, bos] for row in rows):
        return (
            f"Rows begin with {tokenizer.bos_token} twice: once from the chat template and once from the text. "
            "Remove it from the rows, or from the template."
        )
    adds_it = bos in tokenizer("")["input_ids"][:1]
    if adds_it and any(len(row.ids) and row.ids[0] != bos for row in rows):
        return (
            f"This model knows texts that begin with {tokenizer.bos_token}, and the chat template does not write it. "
            "Choose a prompt_format that does (guanaco, alpaca), or begin your own with {{ bos_token }}."
        )
    return ""


def _own_system_prompt(tokenizer: Any) -> str:
    """Whether rows without a system turn are written as if they had one, which is what the template's author put there."""
    roles: tuple[Role, ...] = ("system", "user", "assistant")
    said = [Message(role=role, content=f"the {role} says") for role in roles]
    try:
        begins = whole(tokenizer, said).partition(said[0].content)[0]
        added = whole(tokenizer, said[1:]).partition(said[1].content)[0]
    except UserError:  # it takes no system turn
        return ""
    if not begins.removeprefix(tokenizer.bos_token or "").strip() or not added.startswith(begins) or added == begins:
        return ""
    return (
        f"The prompt format puts a system prompt of its own before rows that have none ({added[:80]!r} …), and it is read in training. "
        "Choose prompt_format chatml, guanaco or alpaca to leave it out."
    )


def _ends(tokenizer: Any, answers: Sequence[TokenRow]) -> str:
    """Whether the model is taught to stop: the last trained token of each turn must be one that generation can stop at."""
    known = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
    for row in answers:
        for place in _turn_ends(row):
            if int(row.ids[place]) not in known:
                said = row.text[max(0, int(row.offsets[place, 1]) - 12) : int(row.offsets[place, 1])]
                return (
                    f"The assistant's turns end in ordinary text (… {said!r}), so the model is never taught a token to stop at. "
                    "If that text is meant as one token, add it to new_tokens; else end the turns in your template with "
                    f"{{{{ eos_token }}}}, or choose prompt_format guanaco or alpaca, which end them with {tokenizer.eos_token}."
                )
    return ""


def _other_ends(tokenizer: Any, answers: Sequence[TokenRow], generation_ends: Sequence[int]) -> str:
    taught = {int(row.ids[place]) for row in answers for place in _turn_ends(row)}
    if not taught or not generation_ends or taught & set(generation_ends) or _ends(tokenizer, answers):
        return ""
    end, others = (", ".join(_name(tokenizer, id) for id in sorted(ids)) for ids in (taught, set(generation_ends)))
    return (
        f"Turns end with {end} in this prompt format, but the model's generation settings stop at {others} only. "
        f"The chat of this app stops at both; give other tools eos_token_id={sorted(taught)[0]}."
    )


def _name(tokenizer: Any, id: int) -> str:
    return tokenizer.convert_ids_to_tokens(id) or f"token {id}, which the tokenizer does not have,"


def _turn_ends(row: TokenRow) -> list[int]:
    """Places of trained tokens that no trained one follows."""
    following = [*row.trained[1:].tolist(), False]
    return [place for place, trained in enumerate(row.trained.tolist()) if trained and not following[place]]
