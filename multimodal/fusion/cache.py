"""The generation cache of a fused model.

It holds the decoder's own cache, the cross keys and values of every image, and the book-keeping that says which image
is which. Everything one generation needs to know about its pictures is here and nowhere else, so any number of
generations can run on one model at once.

Axes: B batch, I images, L region tokens per image, S = I * L, K key/value heads, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


class FusionCache(EncoderDecoderCache):
    """A decoder cache and the cross keys and values beside it.

    Args:
        self_attention_cache: The cache that the decoder would use alone (dynamic, static, ...).

    Attributes:
        ordinals: ``(B, I)``, 1 for a row's first image, 2 for its second, 0 for padding; None before the first image.
        placeholders: ``(B,)``, how many image placeholders the rows have had so far; None before the first image.
    """

    def __init__(self, self_attention_cache: Cache) -> None:
        super().__init__(self_attention_cache, DynamicCache())
        self.ordinals: torch.Tensor | None = None
        self.placeholders: torch.Tensor | None = None

    def update_cross(
        self, block_index: int, new: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one block's new keys and values, each ``(B, K, S_new, C)``, and return all: ``(B, K, S, C)``."""
        if new is not None:
            return self.cross_attention_cache.update(*new, block_index)
        layer = self.cross_attention_cache.layers[block_index]
        return layer.keys, layer.values

    def reset(self) -> None:
        """Forget everything, images too."""
        self.self_attention_cache.reset()
        self.cross_attention_cache = DynamicCache()
        self.ordinals = self.placeholders = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows ``beam_idx`` in that order, pictures included."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, pictures included."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows ``indices``, pictures included."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.ordinals is not None and self.placeholders is not None:
            self.ordinals, self.placeholders = change(self.ordinals), change(self.placeholders)
