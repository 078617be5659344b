"""Runs a fused model's decoder on fixed slots: reads prompts into them, and makes one token in each of many at once.

A slot is a row of the static key/value cache and the cross keys and values of its pictures. What always holds: what is
computed for a slot hangs on that slot alone, whatever stands in the others; a row that sees no picture is the bare
decoder. A runner knows tokens and slots; requests, sampling and text are the engine's.

Axes: B rows, T tokens, D width, H heads, K key/value heads, G = H / K, C width of a head, N layers, M blocks,
L region tokens of a picture, S region tokens of a slot, V vocabulary.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from multimodal.engine.quantised import Kind, quantise
from multimodal.engine.weights import (
    BlockWeights,
    GateWeights,
    LayerWeights,
    head_norm,
    matrix,
    query_norms,
    rotary_tables,
    touches_decoder,
)
from multimodal.fusion import FusionForConditionalGeneration

Linear = Callable[[torch.Tensor], torch.Tensor]  # (T, D_in) -> (T, D_out)


@dataclass(frozen=True)
class PictureStates:
    """A picture as the blocks read it: cross keys and values, each ``(M, K, L, C)``, before the query norm's weight."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Row:
    """One row of a step.

    Attributes:
        slot: Where its cache is.
        token: What it reads now.
        length: How many tokens its cache holds.
        pictures: How many pictures it has seen.
    """

    slot: int
    token: int
    length: int
    pictures: int


class Runner(ABC):
    """What an engine asks of a way to run a model.

    Attributes:
        slots: How many slots there are.
        positions: How many tokens a slot holds.
        pictures: How many pictures a slot holds.
        computes_in_modules: Whether the adapter that counts is the one that is active in the model's modules.
    """

    computes_in_modules = False
    slots: int
    positions: int
    pictures: int

    @abstractmethod
    def prepare(self) -> None:
        """Do now what the first request would have to wait for."""

    @abstractmethod
    def see(self, slot: int, place: int, picture: PictureStates) -> None:
        """Put a picture into a slot as its number ``place``, from 0."""

    @abstractmethod
    def read(
        self, slot: int, tokens: Sequence[int], start: int, seen: Sequence[int], adapter: str | None = None
    ) -> torch.Tensor:
        """Read a piece of a prompt into a slot.

        Args:
            slot: The slot.
            tokens: ``T`` token ids.
            start: How many tokens the slot holds before them; later ones are forgotten.
            seen: For each token, how many pictures stand at or before it.
            adapter: PEFT's name of an adapter, or None.

        Returns:
            Logits ``(V,)`` behind the last token, in float32.
        """

    @abstractmethod
    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        """Read one token in each of some slots: logits ``(B, V)`` in float32."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads."""

    @abstractmethod
    def copy(self, source: int, target: int, length: int, pictures: int) -> None:
        """Make the first tokens and pictures of one slot those of another."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer's linear maps."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Block:
    """A cross-attention block's linear maps and gates."""

    q: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention_gate: GateWeights | None
    feed_forward_gate: GateWeights | None


@dataclass(frozen=True)
class Packed:
    """What a runner makes of the weights, for one adapter."""

    layers: list[Layer]
    blocks: list[Block]
    head: Linear


class TorchRunner(Runner):
    """Torch operators, few of them, on a CPU or a GPU.

    Args:
        model: A fused model without an :func:`~multimodal.engine.weights.obstacle`; it stays as it is.
        dtype: Of weights and computation: float32 or bfloat16.
        slots: As :class:`Runner`.
        positions: Likewise.
        pictures: Likewise.
        quantised: What the weights are kept in instead, and unpacked from in every step. In int4, the head is kept in
            int8.
    """

    spare_slots = 0  # that no request gets

    def __init__(
        self,
        model: FusionForConditionalGeneration,
        dtype: torch.dtype,
        *,
        slots: int,
        positions: int,
        pictures: int,
        quantised: Kind | None = None,
    ) -> None:
        config, text = model.config, model.config.text_config
        self.quantised = quantised
        self.model, self.dtype, self.device = model, dtype, model.device
        self.slots, self.positions, self.pictures = slots, positions, pictures
        self.eps = text.rms_norm_eps
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // self.heads
        self.cross_heads, self.cross_kv_heads = config.cross_attention_heads, config.cross_attention_key_value_heads
        self.cross_head_dim = text.hidden_size // self.cross_heads
        self.latents, self.latest_only = config.num_latents, config.visibility == "latest"
        self.block_at = {layer: index for index, layer in enumerate(config.cross_attention_layers)}
        self.layer_count = text.num_hidden_layers
        self.embedding = model.model.language_model.embed_tokens.weight.detach()
        cos, sin = rotary_tables(model, positions)
        half = self.head_dim // 2
        self.cos = cos.to(dtype)  # (P, C)
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], -1).to(dtype)  # the sign of rotate-half in it
        self.query_norm = query_norms(model)
        self._make_caches()
        self._packed: dict[str | None, Packed] = {}
        self._weight_bytes = 0

    def _make_caches(self) -> None:
        rows = self.slots + self.spare_slots
        shape = (self.layer_count, rows, self.kv_heads, self.positions, self.head_dim)
        self.keys, self.values = self._zeros(shape), self._zeros(shape)
        regions = self.pictures * self.latents
        shape = (len(self.block_at), rows, self.cross_kv_heads, regions, self.cross_head_dim)
        self.cross_keys, self.cross_values = self._zeros(shape), self._zeros(shape)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A cache. On a CPU its memory is taken page by page, as it is written to: a slot is rarely full."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.cache_dtype, device=self.device)
        size = math.prod(shape) * torch.empty((), dtype=self.cache_dtype).element_size()
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else a slot's first token takes 2 MB for each head of each layer
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=self.cache_dtype).view(shape)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the cached keys and values."""
        return self.dtype

    # ---- weights

    def pack(self, weight: torch.Tensor, norm: torch.Tensor | None = None) -> Linear:
        """A linear map from its float32 matrix, and the weight of the norm before it."""
        return self._kept(weight, norm, self.quantised)

    def _kept(self, weight: torch.Tensor, norm: torch.Tensor | None, kind: Kind | None) -> Linear:
        """A linear map, and its bytes counted."""
        if kind is not None:
            packed = quantise(weight, kind, norm)
            self._weight_bytes += packed.nbytes
            return packed
        weight = (weight if norm is None else weight * norm).to(self.dtype).contiguous()
        self._weight_bytes += weight.nbytes
        return lambda states: functional.linear(states, weight)

    def prepare(self) -> None:
        """Pack the weights."""
        self.packed(None)

    @torch.no_grad()
    def packed(self, adapter: str | None) -> Packed:
        """The weights with an adapter; the decoder's own are shared where it leaves them alone."""
        if adapter not in self._packed:
            base = None if adapter is None or touches_decoder(self.model, adapter) else self.packed(None)
            self._packed[adapter] = Packed(
                layers=[self._layer(i, adapter) for i in range(self.layer_count)] if base is None else base.layers,
                blocks=[self._block_weights(i, adapter) for i in range(len(self.block_at))],
                head=self._head(adapter) if base is None else base.head,
            )
        return self._packed[adapter]

    def _head(self, adapter: str | None) -> Linear:
        kind: Kind | None = None if self.quantised is None else "int8"
        return self._kept(matrix(self.model.lm_head, adapter), head_norm(self.model), kind)

    def _layer(self, index: int, adapter: str | None) -> Layer:
        found = LayerWeights(self.model, index, adapter)
        return Layer(
            self.pack(found.qkv, found.attention_norm),
            self.pack(found.o),
            self.pack_gate_up(found.gate_up, found.feed_forward_norm),
            self.pack_down(found.down),
        )

    def _block_weights(self, index: int, adapter: str | None) -> Block:
        found = BlockWeights(self.model, index, adapter)
        return Block(
            self.pack(found.q, found.attention_norm),
            self.pack(found.o),
            self.pack_gate_up(found.gate_up, found.feed_forward_norm),
            self.pack_down(found.down),
            self.pack_gate(found.attention_gate),
            self.pack_gate(found.feed_forward_gate),
        )

    def pack_gate_up(self, weight: torch.Tensor, norm: torch.Tensor) -> Linear:
        """As :meth:`pack`, of gate and up projection ``(2F, D)``."""
        return self.pack(weight, norm)

    def pack_down(self, weight: torch.Tensor) -> Linear:
        """As :meth:`pack`, of the projection behind them ``(D, F)``."""
        return self.pack(weight)

    def pack_gate(self, gate: GateWeights | None) -> GateWeights | None:
        """A dynamic gate's weights; None for a static one, which is in the matrices."""
        return None if gate is None else GateWeights(gate.weight.to(self.dtype), gate.bias.to(self.dtype))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        self.packed(None)
        return self._weight_bytes

    # ---- slots

    def see(self, slot: int, place: int, picture: PictureStates) -> None:
        """Keep a picture's cross keys and values; the query norm's weight goes into the keys."""
        span = slice(place * self.latents, (place + 1) * self.latents)
        for at in range(len(self.cross_keys)):  # all at once, on a CPU torch would wake its threads: that takes longer
            keys = picture.keys[at].float()
            self.cross_keys[at, slot, :, span] = keys if self.query_norm is None else keys * self.query_norm[at]
            self.cross_values[at, slot, :, span] = picture.values[at]

    def copy(self, source: int, target: int, length: int, pictures: int) -> None:
        """Copy keys and values."""
        for cache, count in (
            *((cache, length) for cache in (self.keys, self.values)),
            *((cache, pictures * self.latents) for cache in (self.cross_keys, self.cross_values)),
        ):
            cache[:, target, :, :count] = cache[:, source, :, :count]

    # ---- the pieces

    def _norm(self, states: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(states, states.shape[-1:], None, self.eps)

    def _rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin)

    def _feed_forward(self, states: torch.Tensor, layer: Layer | Block) -> torch.Tensor:
        gate, up = layer.gate_up(states).chunk(2, -1)
        return layer.down(functional.silu(gate).mul_(up))

    @staticmethod
    def _weigh(gate: GateWeights | None, normed: torch.Tensor) -> torch.Tensor | float:
        """A dynamic gate's weight of each token ``(T, 1)``; 1 for a static gate."""
        return 1.0 if gate is None else torch.sigmoid((normed @ gate.weight + gate.bias)[:, None])

    def _block(
        self, states: torch.Tensor, block: Block, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """A block over tokens that all see a picture.

        Args:
            states: ``(B * T, D)``.
            block: The weights.
            keys: ``(B, K, S, C)``.
            values: Likewise.
            mask: ``(B, 1, T, S)``, True where a token looks; None for everywhere.
        """
        rows = len(keys)
        normed = self._norm(states)
        queries = block.q(normed).view(rows, -1, self.cross_heads, self.cross_head_dim)  # (B, T, H, C)
        if self.query_norm is not None:
            queries = self._norm(queries)
        if rows == len(states):  # one token in each: groups as positions
            queries = queries.view(rows, self.cross_kv_heads, -1, self.cross_head_dim)
            attended = functional.scaled_dot_product_attention(queries, keys, values, mask).reshape(rows, -1)
        else:
            attended = functional.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, mask, enable_gqa=self.cross_heads > self.cross_kv_heads
            )
            attended = attended.transpose(1, 2).reshape(len(states), -1)
        states = states + block.o(attended) * self._weigh(block.attention_gate, normed)
        normed = self._norm(states)
        return states + self._feed_forward(normed, block) * self._weigh(block.feed_forward_gate, normed)

    def _span(self, pictures: int) -> tuple[int, int]:
        """Which region tokens of a slot a token sees that has so many pictures at or before it."""
        return (max(pictures - 1, 0) if self.latest_only else 0) * self.latents, pictures * self.latents

    # ---- reading

    def read(
        self, slot: int, tokens: Sequence[int], start: int, seen: Sequence[int], adapter: str | None = None
    ) -> torch.Tensor:
        """Read a piece of a prompt; only what stands behind the first picture runs through the blocks."""
        packed, end, count = self.packed(adapter), start + len(tokens), len(tokens)
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]  # (T, 1, C)
        split = self.heads + self.kv_heads
        states = self._embed(tokens)  # (T, D)
        causal = None
        if start:
            places = torch.arange(end, device=self.device)
            causal = places <= places[start:, None]  # (T, P)
        blind = sum(number == 0 for number in seen)  # they come first
        look = None if blind == count else self._looks(seen[blind:])
        for index, layer in enumerate(packed.layers):
            if look is not None and index in self.block_at:
                at, (last, mask) = self.block_at[index], look
                keys, values = (
                    cache[at, slot, :, :last][None].to(self.dtype) for cache in (self.cross_keys, self.cross_values)
                )
                block = self._block(states[blind:], packed.blocks[at], keys, values, mask)
                states = torch.cat([states[:blind], block]) if blind else block
            heads = layer.qkv(self._norm(states)).view(count, -1, self.head_dim)  # (T, H + 2K, C)
            turned = self._rotate(heads[:, :split], cos, sin).transpose(0, 1)  # (H + K, T, C)
            self.keys[index, slot, :, start:end] = turned[self.heads :]
            self.values[index, slot, :, start:end] = heads[:, split:].transpose(0, 1)
            keys, values = (cache[index, slot, :, :end][None].to(self.dtype) for cache in (self.keys, self.values))
            attended = functional.scaled_dot_product_attention(
                turned[None, : self.heads],
                keys,
                values,
                causal,
                is_causal=causal is None,
                enable_gqa=self.heads > self.kv_heads,
            )
            states = states + layer.o(attended[0].transpose(0, 1).reshape(count, -1))
            states = states + self._feed_forward(self._norm(states), layer)
        return packed.head(self._norm(states[-1:]))[0].float()

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.embedding[torch.tensor(tokens, device=self.device)].to(self.dtype)

    def _looks(self, seen: Sequence[int]) -> tuple[int, torch.Tensor | None]:
        """How many region tokens are looked at in all, and which by whom ``(1, 1, T, S)``; None for all by all."""
        spans = [self._span(number) for number in seen]
        last = max(end for _, end in spans)
        if all(span == (0, last) for span in spans):
            return last, None
        places = torch.arange(last, device=self.device)
        first, end = torch.tensor(spans, device=self.device).T[:, :, None]  # (T, 1)
        return last, ((places >= first) & (places < end))[None, None]

    # ---- one token in each of many rows

    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        """One token in each row; only rows that see a picture run through the blocks."""
        packed, count = self.packed(adapter), len(rows)
        slots = torch.tensor([row.slot for row in rows], device=self.device)
        places = torch.tensor([row.length for row in rows], device=self.device)
        most = max(row.length for row in rows) + 1
        mask = (torch.arange(most, device=self.device) <= places[:, None])[:, None, None]  # (B, 1, 1, P)
        seeing = [index for index, row in enumerate(rows) if row.pictures]
        look = None if not seeing else self._step_looks([rows[index] for index in seeing])

        def see(at: int, states: torch.Tensor) -> torch.Tensor:
            if look is None:
                return states
            seeing_slots, last, regions = look
            keys, values = (
                cache[at, seeing_slots, :, :last].to(self.dtype) for cache in (self.cross_keys, self.cross_values)
            )
            if len(seeing) == count:
                return self._block(states, packed.blocks[at], keys, values, regions)
            states = states.clone()
            states[seeing] = self._block(states[seeing], packed.blocks[at], keys, values, regions)
            return states

        return self._decode(packed, self._embed([row.token for row in rows]), slots, places, mask, see).float()

    def _decode(
        self,
        packed: Packed,
        states: torch.Tensor,
        slots: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        see: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Run the decoder over one token in each row.

        Args:
            packed: The weights.
            states: ``(B, D)``, embedded tokens.
            slots: ``(B,)``, where each row's cache is.
            places: ``(B,)``, each token's position.
            mask: ``(B, 1, 1, P)``, which positions it looks at: True there, or what is added to the scores.
            see: Puts states ``(B, D)`` through a block, by its number.

        Returns:
            Logits ``(B, V)``.
        """
        count, most, split = len(states), mask.shape[-1], self.heads + self.kv_heads
        cos, sin = self.cos[places, None], self.sin[places, None]  # (B, 1, C)
        for index, layer in enumerate(packed.layers):
            if index in self.block_at:
                states = see(self.block_at[index], states)
            heads = layer.qkv(self._norm(states)).view(count, -1, self.head_dim)  # (B, H + 2K, C)
            turned = self._rotate(heads[:, :split], cos, sin)
            self.keys[index, slots, :, places] = turned[:, self.heads :].to(self.keys.dtype)
            self.values[index, slots, :, places] = heads[:, split:].to(self.values.dtype)
            keys, values = (cache[index, slots, :, :most].to(self.dtype) for cache in (self.keys, self.values))
            queries = turned[:, : self.heads].view(count, self.kv_heads, -1, self.head_dim)  # groups as positions
            attended = functional.scaled_dot_product_attention(queries, keys, values, mask)
            states = states + layer.o(attended.reshape(count, -1))
            states = states + self._feed_forward(self._norm(states), layer)
        return packed.head(self._norm(states))

    def _step_looks(self, rows: Sequence[Row]) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        last, mask = self._looks([row.pictures for row in rows])
        slots = torch.tensor([row.slot for row in rows], device=self.device)
        return slots, last, None if mask is None else mask.transpose(0, 2)  # (B, 1, 1, S)
