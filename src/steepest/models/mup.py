"""The maximal update parametrisation: learning rates that carry over from width to width.

Yang et al., 2022 (Tensor Programs V, arXiv:2203.03466, table 8), as a factor m = hidden_size /
mup_base_width: matrices between layers start with their deviation over sqrt(m) and learn with
their learning rate over m, logits are divided by m, attention scores by head_size rather than its
root. Tables and vectors stay as they are. At m = 1 the weights are those of the standard model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from steepest.models.config import ModelConfig


@dataclass(frozen=True)
class MuPConfig(ModelConfig):
    """Options of the models that have the parametrisation."""

    mup_base_width: int | None = None
    """hidden_size for which learning rates and deviations are given; not given: no scaling."""
    embedding_scale: float = 1.0
    """What token (and position) vectors are multiplied by."""
    depth_scale: float | None = None
    """Residual branches are multiplied by depth_scale / sqrt(layers), if given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mup_base_width is not None:
            self.require_counts("mup_base_width")
        if self.depth_scale is not None:
            self.require_positive("depth_scale")
        self.require_positive("embedding_scale")

    @property
    def width_factor(self) -> float:
        """hidden_size over the base width."""
        return 1.0 if self.mup_base_width is None else self.hidden_size / self.mup_base_width

    @property
    def branch_scale(self) -> float:
        """What the outputs of attention and MLP are multiplied by."""
        return 1.0 if self.depth_scale is None else self.depth_scale / math.sqrt(self.layers)

    def attention_scale(self, head_size: int) -> float | None:
        """Return what attention scores are multiplied by; None: 1 / sqrt(head_size)."""
        return None if self.mup_base_width is None else 1 / head_size


def lr_multipliers(config: ModelConfig | None) -> dict[str, float]:
    """Return what the learning rates of roles are multiplied by; 1 where a role is not named.

    They are those of methods whose update has elements of about the size of lr, as Adam's and
    Lion's have. A method that scales its update by the shape of the matrix needs none.
    """
    if not isinstance(config, MuPConfig) or config.mup_base_width is None:
        return {}
    return {"hidden": 1 / config.width_factor}
