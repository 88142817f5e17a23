"""What all models have in common: tokens in, logits or a loss out."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steepest.errors import UserError
from steepest.models import cross_entropy, initialisation
from steepest.models.config import ModelConfig
from steepest.models.layers import Embedding, Linear, compute_dtype, scaled


class Loss(NamedTuple):
    """The loss of some tokens; 0-d tensors in float32."""

    objective: Tensor
    """What training minimises: the cross-entropy and what was added to it."""
    cross_entropy: Tensor
    """Nats per token, without a gradient."""
    statistics: dict[str, Tensor]
    """Other numbers by name: auxiliary losses, entropies; without gradients."""


class Features(NamedTuple):
    """What a model makes of tokens before its head."""

    hidden: Tensor
    """Normalised last hidden states [batch, time, hidden]."""
    auxiliary: Tensor | None
    """What the architecture adds to the loss of a token on average, 0-d; None if nothing."""
    statistics: dict[str, Tensor]
    """0-d tensors by name, without gradients."""


class LanguageModel(nn.Module):
    """A causal language model: an embedding, layers, a final norm and a head without bias.

    A subclass builds its layers, then calls `complete`, and defines `features`.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("embed_tokens.", "lm_head.")
    """How the names of the parameters begin that are tables of tokens or positions."""
    residual_outputs: ClassVar[tuple[str, ...]] = ()
    """How the names of the matrices end that write into the residual stream."""

    config: ModelConfig
    lm_head: Linear
    recompute_activations: bool = False
    """Keep the inputs of layers alone for the backward pass, which computes the rest again."""

    def __init__(self, config: Any, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Features:
        """Return the last hidden states of int64 tokens [batch, time].

        With `documents`, int32 [batch, time], each token sees its own document alone, whose
        positions start at 0 (see `steepest.models.documents`).
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the logits [batch, time, vocab] of the next token for int64 tokens [batch, time].

        Raises UserError when the sequence is longer than the config's max_sequence_length.
        """
        logits: Tensor = self.lm_head(self.features(self._checked(tokens), documents).hidden)
        return scaled(logits, self.logit_scale)

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats per token, float32, of int64 [batch, time].

        Positions whose target is -100 don't count. Nothing is added to it.
        """
        hidden = self.features(self._checked(tokens), documents).hidden
        total, _ = cross_entropy.sums(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), scale=self.logit_scale
        )
        return total / (targets != cross_entropy.IGNORED).sum()

    def objective(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *,
        tokens_in_batch: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Loss:
        """Return what training minimises on int64 tokens and targets [batch, time].

        The sums over tokens are divided by `tokens_in_batch`, a 0-d tensor: the number of targets
        other than -100, unless this is a part of a larger batch over which the mean is wanted.
        `z_loss` is the coefficient of the mean square of log Z.
        """
        features = self.features(self._checked(tokens), documents)
        count = (targets != cross_entropy.IGNORED).sum()
        whole = count if tokens_in_batch is None else tokens_in_batch
        total, nats = cross_entropy.sums(
            features.hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            scale=self.logit_scale,
            z_loss=z_loss,
        )
        objective = total / whole
        if features.auxiliary is not None:
            objective = objective + features.auxiliary * (count / whole)
        return Loss(objective, nats / whole, features.statistics)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the tokens' vectors [batch, time, hidden], in bfloat16 where autocast is on.

        So the residual stream is in the dtype of the matrices that read it.
        """
        x: Tensor = self.embed_tokens(tokens)
        return x.to(compute_dtype(x))

    def through(self, layer: nn.Module, x: Tensor, *context: Any) -> Any:
        """Return what a layer makes of x, recomputed in the backward pass if so asked."""
        if self.recompute_activations and self.training:
            return checkpoint(layer, x, *context, use_reentrant=False)
        return layer(x, *context)

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied by."""
        return 1.0

    def complete(self, generator: torch.Generator | None) -> None:
        """Add the head and draw the initial weights, from seed 0 without a generator.

        On the meta device nothing is drawn.
        """
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            self.reset_parameters(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the initial weights, parameter by parameter in order, by the config's scheme."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, generator)

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Give one parameter its initial values: gains 1, biases 0, others normal."""
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        std = initialisation.deviation(
            self.config,
            table=name.startswith(self.embeddings),
            residual_output=name.endswith(self.residual_outputs),
        )
        initialisation.draw_normal(parameter, std, generator)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.max_sequence_length:
            raise UserError(
                f"A sequence of {tokens.shape[1]} tokens is longer than the model's "
                f"max_sequence_length of {self.config.max_sequence_length}."
            )
        return tokens
