"""A LLaMA whose MLPs are mixtures of experts, routed by tokens or by experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.errors import UserError
from steepest.models import routing
from steepest.models.attention import Mask, document_mask
from steepest.models.experts import Experts
from steepest.models.language_model import Features
from steepest.models.layers import Linear, RMSNorm, SwiGLU, scaled
from steepest.models.llama import Attention, Llama, LlamaConfig
from steepest.models.rotary import Turns


@dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """Shape of a LLaMA with experts. Raises UserError when a value is impossible."""

    architecture: Literal["moe"] = "moe"  # type: ignore[assignment]
    """Which model this is the config of."""
    experts: int = 8
    """MLPs in a layer, shared ones included."""
    experts_per_token: int = 2
    """Routed experts that a token goes through."""
    shared_experts: int = 0
    """How many of the experts are always on, with weight 1 and without a router."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """Tokens choose their experts, or experts their tokens (of all the batch, later ones too)."""
    gates: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Weights of a token's experts: softmax over the chosen ones, or over all of them."""
    capacity_factor: float = 2.0
    """With expert_choice, experts that a token goes through on average."""
    balance_loss: float = 0.01
    """Coefficient of the Switch load-balancing loss, with token_choice."""
    router_z_loss: float = 0.001
    """Coefficient of the mean square of the router's log Z, with token_choice."""
    entropy_loss: float = 0.0
    """Coefficient of minus the entropy of the mean routing odds, with token_choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("experts", "experts_per_token")
        self.require_positive("capacity_factor")
        self.require_one_of("routing", ("token_choice", "expert_choice"))
        self.require_one_of("gates", ("topk_softmax", "softmax_topk"))
        for name in ("shared_experts", "balance_loss", "router_z_loss", "entropy_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"Model {name} must not be negative, but is {getattr(self, name)}.")
        if self.hidden_size % 8 or self.intermediate_size % 8:
            raise UserError(
                "Model hidden_size and intermediate_size must be multiples of 8 with experts "
                f"(grouped products take rows of 16 bytes), not {self.hidden_size} and "
                f"{self.intermediate_size}."
            )
        if self.shared_experts + self.experts_per_token > self.experts:
            raise UserError(
                f"Model experts must be at least shared_experts + experts_per_token, but "
                f"{self.experts} is less than {self.shared_experts} + {self.experts_per_token}."
            )

    @property
    def routed_experts(self) -> int:
        """Experts that are not always on."""
        return self.experts - self.shared_experts

    @property
    def idle_parameters(self) -> int:
        """Parameters that a token does not go through."""
        idle = self.routed_experts - self.experts_per_token
        return self.layers * idle * 3 * self.hidden_size * self.intermediate_size


class MoE(nn.Module):
    """The sum of a token's experts, each times its gate, and of the shared experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.router = Linear(hidden, config.routed_experts)
        self.experts = Experts(config.routed_experts, hidden, inner)
        # The sum of several SwiGLU is one whose channels are theirs side by side.
        self.shared: SwiGLU | None = None
        if config.shared_experts:
            self.shared = SwiGLU(hidden, config.shared_experts * inner)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [batch, time, hidden], and float32 `routing.NUMBERS`."""
        config, rows = self.config, x.flatten(0, 1)
        # In float32: rounding would send tokens to other experts.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.float(), self.router.weight.float())
        if config.routing == "token_choice":
            chosen, gates = routing.by_tokens(logits, config.experts_per_token, config.gates)
            y = self.experts.of_tokens(rows, chosen, gates)
            load = routing.load(chosen, config.routed_experts)
        else:
            count = routing.capacity(len(rows), config.routed_experts, config.capacity_factor)
            chosen, gates = routing.by_experts(logits, count, config.gates)
            y = self.experts.on_tokens(rows, chosen, gates)
            load = torch.full_like(logits[0], count / len(rows))
        if self.shared is not None:
            y = y + self.shared(rows)
        return y.view_as(x), routing.numbers(logits, load)


class Layer(nn.Module):
    """One block: attention, then experts, each on the normalised residual stream."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.branch_scale = config.branch_scale
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MoE(config)

    def forward(self, x: Tensor, turns: Turns, mask: Mask | None) -> tuple[Tensor, Tensor]:
        x = x + scaled(self.attention(self.attention_norm(x), turns, mask), self.branch_scale)
        y, numbers = self.mlp(self.mlp_norm(x))
        return x + scaled(y, self.branch_scale), numbers


class MoELlama(Llama):
    """A LLaMA with experts whose initial weights are those of `generator` (default: seed 0)."""

    residual_outputs = (*Llama.residual_outputs, "experts.down_proj")
    block = Layer
    config: MoEConfig

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Features:
        """Return the last hidden states; see `LanguageModel.features`.

        Auxiliary losses are means over layers.
        """
        config = self.config
        turns = self.rotary(tokens.shape[1], documents)
        mask = document_mask(documents, config.head_size)
        x = scaled(self.embed(tokens), config.embedding_scale)
        numbers = []
        for layer in self.layers:
            x, of_layer = self.through(layer, x, turns, mask)
            numbers.append(of_layer)
        means = dict(zip(routing.NUMBERS, torch.stack(numbers).mean(0), strict=True))
        auxiliary = None
        if config.routing == "token_choice":
            auxiliary = (
                config.balance_loss * means["balance"]
                + config.router_z_loss * means["router_z"]
                - config.entropy_loss * means["router_entropy"]
            )
        return Features(self.norm(x), auxiliary, {k: v.detach() for k, v in means.items()})
