"""Text from a model: the most probable next token each time, or one drawn from the predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    window: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return int64 tokens [batch, time] with `new_tokens` more, [batch, time + new_tokens].

    At temperature 0 each is the most probable one. Otherwise it is drawn, by `generator`, from the
    softmax of logits / temperature, cut to the `top_k` most probable tokens (Fan et al., 2018,
    arXiv:1805.04833) and then to the fewest whose probabilities sum to `top_p` (Holtzman et al.,
    2019, arXiv:1904.09751). After the token `end` a row is filled with it.

    The model sees the last `window` tokens, max_sequence_length if not given or if that is less,
    and computes all of them anew for each one. It is in evaluation mode meanwhile. Raises UserError
    for no tokens and for numbers out of range.
    """
    batch, time = tokens.shape
    longest = model.config.max_sequence_length
    seen = longest if window is None else min(window, longest)
    _check_odds(temperature, top_k, top_p)
    _check_lengths(time, new_tokens, seen)
    result = torch.cat((tokens, tokens.new_full((batch, new_tokens), 0 if end is None else end)), 1)
    going = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    training = model.training
    model.eval()
    try:
        for place in range(time, time + new_tokens):
            logits = _next_logits(model, result[:, max(0, place - seen) : place])
            drawn = choose(logits, temperature, top_k, top_p, generator)
            if end is not None:
                drawn = torch.where(going, drawn, end)
                going &= drawn != end
            result[:, place] = drawn
            if not going.any():
                break
    finally:
        model.train(training)
    return result


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a token for each row of logits [batch, vocab], int64 [batch], as `generate` does."""
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits - logits.amax(-1, keepdim=True)).double()
    odds = (below / temperature).softmax(-1)
    odds, order = odds.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        odds[:, top_k:] = 0
    if top_p is not None:
        before = odds.cumsum(-1) - odds
        odds[before >= top_p * odds.sum(-1, keepdim=True)] = 0
    drawn = torch.multinomial(odds, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def _next_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the logits [batch, vocab] of the token after these [batch, time], in float32."""
    logits: Tensor = model.lm_head(model.features(tokens).hidden[:, -1])
    return logits.float() * model.logit_scale


def _check_lengths(time: int, new_tokens: int, window: int) -> None:
    if time == 0:
        raise UserError("Generation needs at least one token to begin with.")
    if new_tokens < 0:
        raise UserError(f"The number of new tokens must not be negative, but it is {new_tokens}.")
    if window < 1:
        raise UserError(f"window must be at least 1, not {window}.")


def _check_odds(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be 0 or a positive number, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}.")
