"""FusionTrace: how far the gates stood open, and where the model looked, token by token.

It is computed by one forward pass over a whole sequence (a prompt, or a prompt and its answer): the states are the same
as those of the steps that generated the answer, so nothing has to be recorded while generating.

Axes: B batch, M cross-attention blocks, T text tokens, I images, L region tokens per image, R grid cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from multimodal.fusion.cross_attention import BlockRecord


@dataclass(frozen=True)
class FusionTrace:
    """Gates and attention of one forward pass. Outside of ``torch.no_grad`` it has gradients, for a loss on it.

    Row ``t`` of the token axis belongs to the state that reads token ``t`` and predicts token ``t + 1``.

    Attributes:
        layers: The decoder layer before which each block stands, ``M`` numbers.
        attention_gates: ``(B, M, T)``, openness of the attention gates, 0 shut to 1 open; 0 where no image is seen.
        feed_forward_gates: ``(B, M, T)``, likewise.
        attention: ``(B, M, T, I, L)``, attention over region tokens; sums to 1 over ``I, L`` where an image is seen.
        resampler_maps: ``(B, I, L, R)``, what part of the grid each region token stands for; sums to 1 over ``R``.
        grid: Rows and columns of the encoder's grid, ``rows * columns == R``.
    """

    layers: tuple[int, ...]
    attention_gates: torch.Tensor
    feed_forward_gates: torch.Tensor
    attention: torch.Tensor
    resampler_maps: torch.Tensor
    grid: tuple[int, int]

    @classmethod
    def from_records(
        cls, records: list[BlockRecord], *, layers: list[int], resampler_maps: torch.Tensor, grid: tuple[int, int]
    ) -> FusionTrace:
        """Stack what the blocks recorded; ``resampler_maps`` is ``(B, I, L, R)``."""
        images_and_regions = resampler_maps.shape[1:3]
        return cls(
            layers=tuple(layers),
            attention_gates=torch.stack([record.attention_gate for record in records], dim=1),
            feed_forward_gates=torch.stack([record.feed_forward_gate for record in records], dim=1),
            attention=torch.stack([record.attention for record in records], dim=1).unflatten(-1, images_and_regions),
            resampler_maps=resampler_maps.float(),
            grid=grid,
        )

    def tokens(self, start: int, stop: int | None = None) -> FusionTrace:
        """The same trace for the tokens ``start`` to ``stop`` only."""
        span = slice(start, stop)
        return replace(
            self,
            attention_gates=self.attention_gates[:, :, span],
            feed_forward_gates=self.feed_forward_gates[:, :, span],
            attention=self.attention[:, :, span],
        )

    def openness(self) -> torch.Tensor:
        """How much picture goes into each token: the mean of the attention gates over the blocks, ``(B, T)``."""
        return self.attention_gates.mean(1)

    def image_attention(self, image: int = 0) -> torch.Tensor:
        """Where on an image each token looks.

        The cross-attention over region tokens is folded back through the resampler's own map of the grid, and averaged
        over the blocks, each weighted by how far its gate stands open.

        Args:
            image: Which of the row's images, from 0.

        Returns:
            ``(B, T, rows, columns)``; sums to at most 1 over the grid, to 1 for a token that sees only this image.
        """
        weights = self.attention_gates / self.attention_gates.sum(1, keepdim=True).clamp_min(1e-9)  # (B, M, T)
        regions = (self.attention[:, :, :, image] * weights[..., None]).sum(1)  # (B, T, L)
        return (regions @ self.resampler_maps[:, image]).unflatten(-1, self.grid)  # (B, T, rows, columns)
