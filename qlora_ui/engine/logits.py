"""Whether two models are the same: their logits on one text. Knows nothing of runs, disk or Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.errors import UserError

ASKED = Message(role="user", content="Who are you, what can you do, and what is 12 times 7? Answer in two short sentences.")
MOST_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far the logits of what was reloaded are from those of what it was made of, over `tokens` tokens of a fixed text.

    `made_of` is what was trained, or what that was rounded to on purpose. `adapter_effect` is how far the base without its
    adapter is from what was trained: what is much closer is no forgotten adapter. Divergences are from what was trained, the
    mean over the tokens of how many nats the distribution of the next one is away (Kullback-Leibler).
    """

    largest_difference: float
    tolerance: float
    made_of: str
    adapter_effect: float
    divergence: float
    divergence_without_adapter: float
    tokens: int
    device: str

    def sentence(self) -> str:
        return (
            f"Verified by reloading: over {self.tokens} tokens its logits differ from those of {self.made_of} "
            f"by at most {self.largest_difference:.2g} on {self.device} (tolerance {self.tolerance:.2g}). "
            f"It is {self.divergence:.2g} nats a token from what was trained; without the adapter it would be "
            f"{self.divergence_without_adapter:.2g}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What a model says to a text, to compare with later, when that model is gone; and what it said trained, and untrained."""

    ids: list[int]
    logits: torch.Tensor
    trained: torch.Tensor
    untrained: torch.Tensor
    made_of: str = "what was trained"

    def after(self, model: Any, made_of: str) -> Reference:
        """The same for what was made of that model."""
        return replace(self, logits=logits(model, self.ids), made_of=made_of)

    def divergence(self, said: torch.Tensor) -> float:
        """Of what was trained from these logits."""
        trained = self.trained.log_softmax(-1)
        return float((trained.exp() * (trained - said.log_softmax(-1))).sum(-1).mean())

    def compare(self, model: Any, rounded_to: torch.dtype | None = None) -> Verification:
        """Raises UserError when the model's logits are further away than they may be. The model's weights are void afterwards.

        The same weights may differ by one rounding of the largest logit. What rounding all weights to another dtype may change is
        measured: three times what it changes to move each of them at random, by as much as such a rounding can.
        """
        said = logits(model, self.ids)
        tolerance = torch.finfo(model.dtype).eps * float(self.logits.abs().max())
        if rounded_to is not None:
            jitter(model, torch.finfo(rounded_to).eps / 2)
            tolerance += 3 * float((logits(model, self.ids) - said).abs().max())
        difference = float((said - self.logits).abs().max())
        if not difference <= tolerance:  # a NaN is no agreement
            raise UserError(
                f"What was written differs from {self.made_of}: reloaded, its logits differ by up to {difference:.3g}, of which "
                f"rounding explains {tolerance:.3g}. Nothing was kept. Export the adapter alone, and please report this."
            )
        return Verification(
            largest_difference=difference,
            tolerance=tolerance,
            made_of=self.made_of,
            adapter_effect=float((self.untrained - self.trained).abs().max()),
            divergence=self.divergence(said),
            divergence_without_adapter=self.divergence(self.untrained),
            tokens=len(self.ids),
            device=str(model.device),
        )


def jitter(model: Any, share: float) -> None:
    """Move every weight at random by up to that share of itself."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.mul_(1 + share * (2 * torch.rand_like(weight, dtype=torch.float32) - 1))


def reference(model: Any, tokenizer: Any, new: Sequence[int]) -> Reference:
    """Of a model with an adapter. `new` are tokens that must be read too, because their embeddings were trained."""
    text = tokens.prompt(tokenizer, [ASKED])
    most = min(MOST_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", MOST_TOKENS)) - 1
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *new][-most:]
    tuned = logits(model, ids)
    with model.disable_adapter():
        untrained = logits(model, ids)
    return Reference(ids=ids, logits=tuned, trained=tuned, untrained=untrained)


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """For each token the float32 logits of the next. An encoder-decoder reads and writes the same text."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel of its own that rounds otherwise, on those CPUs that have it
    return as_it_is(model, ids)


def as_it_is(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The same by whatever kernels the model answers with."""
    batch = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        batch["decoder_input_ids"] = torch.tensor([[start, *ids[:-1]]], device=model.device)
    with torch.inference_mode():
        said: torch.Tensor = model.eval()(**batch).logits[0]
    return said.float().cpu()
