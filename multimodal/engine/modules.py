"""Runs any fused model through its own modules, one slot after another: for decoders that no flat weights describe.

It is slow, and right by construction: what it calls is what ``generate`` calls.

Axes: T tokens, K key/value heads, C width of a head, L region tokens of a picture, S region tokens of a slot,
V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from multimodal.engine.runner import PictureStates, Row, Runner
from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.cache import FusionCache
from multimodal.fusion.cross_attention import VisionContext, visible_images


class ModuleRunner(Runner):
    """The model's own modules; the adapter that is active in them is the one that computes.

    Args:
        model: Any fused model.
        slots: As :class:`Runner`.
        positions: Likewise.
        pictures: Likewise.
    """

    computes_in_modules = True

    def __init__(self, model: FusionForConditionalGeneration, *, slots: int, positions: int, pictures: int) -> None:
        self.model, self.slots, self.positions, self.pictures = model, slots, positions, pictures
        self._pictures: list[list[PictureStates]] = [[] for _ in range(slots)]
        self._caches = [self._new_cache() for _ in range(slots)]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.text_config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of decoder, blocks and head."""
        parts = (self.model.model.language_model.layers, self.model.model.cross_attention_blocks, self.model.lm_head)
        return sum(parameter.nbytes for part in parts for parameter in part.parameters())

    def prepare(self) -> None:
        """Nothing is packed."""

    def see(self, slot: int, place: int, picture: PictureStates) -> None:
        """Keep the picture; what stood there or behind it is forgotten."""
        self._pictures[slot][place:] = [picture]

    def read(
        self, slot: int, tokens: Sequence[int], start: int, seen: Sequence[int], adapter: str | None = None
    ) -> torch.Tensor:
        """Run the decoder over a piece of a prompt."""
        cache = self._caches[slot]
        if start == 0:
            cache = self._caches[slot] = self._new_cache()
        elif cache.get_seq_length() > start:
            cache.crop(start - cache.get_seq_length())
        return self._forward(slot, tokens, seen)

    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        """Run the decoder for one row after another."""
        return torch.stack([self._forward(row.slot, [row.token], [row.pictures]) for row in rows])

    def copy(self, source: int, target: int, length: int, pictures: int) -> None:
        """Copy the decoder's cache."""
        self._caches[target] = copy.deepcopy(self._caches[source])
        if self._caches[target].get_seq_length() > length:
            self._caches[target].crop(length - self._caches[target].get_seq_length())
        self._pictures[target] = self._pictures[source][:pictures]

    def _forward(self, slot: int, tokens: Sequence[int], seen: Sequence[int]) -> torch.Tensor:
        device = self.model.device
        context = None
        if any(seen):
            pictures = self._pictures[slot][: max(seen)]
            cache = FusionCache(DynamicCache())
            for block in range(len(pictures[0].keys)):
                keys, values = (
                    torch.cat([getattr(picture, kind)[block] for picture in pictures], dim=1)[None].to(device)
                    for kind in ("keys", "values")
                )
                cache.update_cross(block, (keys, values))
            config = self.model.config
            ordinals = torch.arange(1, len(pictures) + 1, device=device)[None]  # (1, I)
            visible = visible_images(ordinals, torch.tensor([list(seen)], device=device), config.visibility)
            context = VisionContext(None, visible.repeat_interleave(config.num_latents, dim=-1), cache)
        output = self.model.model.language_model(
            input_ids=torch.tensor([list(tokens)], device=device),
            past_key_values=self._caches[slot],
            use_cache=True,
            vision_context=context,
        )
        return self.model.lm_head(output.last_hidden_state[0, -1]).float()
