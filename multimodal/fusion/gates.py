"""Gates: how much of the picture enters the text stream.

A gate multiplies a branch (attention or feed-forward) before it is added to the residual stream. Every gate starts
shut, so a freshly fused model is the bare decoder, bit for bit. A gate knows nothing about attention or pictures.

Axes: B batch, T text tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn


class TanhGate(nn.Module):
    """Static gate: ``tanh(alpha) * branch`` with ``alpha`` zero at the start.

    Source: Alayrac et al., "Flamingo", 2022, section 3.1.2 (one scalar); Idefics has one value per channel.

    Args:
        hidden_size: Width ``D`` of the branch.
        per_channel: One ``alpha`` per channel, or one for the whole branch.
    """

    def __init__(self, hidden_size: int, per_channel: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(hidden_size if per_channel else 1))

    def forward(self, branch: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale a branch.

        Args:
            branch: ``(B, T, D)``, what the gate lets through.
            hidden_states: ``(B, T, D)``, the token's own state; a static gate does not look at it.

        Returns:
            The gated branch ``(B, T, D)`` and the openness ``(B, T)``: the mean of ``|tanh(alpha)|``, 0 shut to 1 open.
        """
        opening = torch.tanh(self.alpha)
        openness = opening.detach().abs().mean().expand(branch.shape[:-1])
        return opening * branch, openness


class DynamicGate(TanhGate):
    """Gate that weighs picture against language word by word: ``tanh(alpha) * w(token) * branch``.

    ``w(token) = sigmoid(<v, h> + b)``, a weight between 0 and 1 from the token's own normalised state ``h``.
    ``v`` and ``b`` start at zero, so that every token starts with the same weight, one half.
    """

    def __init__(self, hidden_size: int, per_channel: bool = True) -> None:
        super().__init__(hidden_size, per_channel)
        self.token_weight = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.token_weight.weight)
        nn.init.zeros_(self.token_weight.bias)

    def forward(self, branch: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale a branch; see :meth:`TanhGate.forward`. The openness includes the token's weight."""
        scaled, openness = super().forward(branch, hidden_states)
        weight = torch.sigmoid(self.token_weight(hidden_states))  # (B, T, 1)
        return weight * scaled, openness * weight.detach().squeeze(-1)


GATES: dict[str, type[TanhGate]] = {"tanh": TanhGate, "dynamic": DynamicGate}
