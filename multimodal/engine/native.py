"""A runner whose steps are one call of compiled code on packed weights: int8, int4 or bfloat16, on a CPU.

What it does: packs the weights into the tiles that ``native.cpp`` reads, and calls it. Long pieces of a prompt run in
torch, as in the runner that it extends, on one matrix at a time that is unpacked from the tiles into a scratch buffer;
unpacking takes as long as five steps or so, so short ones are steps of several tokens, and longer ones are, too, where
there is no AMX to multiply with and little before them to look back at. What always holds: the tiles are the only copy
of the weights that this module keeps; what a row gets hangs on that row alone, bit for bit.

Norm weights stay outside of the matrices and are multiplied into the activations: the values of a decoder that was in
4 bits once, in groups of 32, are found again without a loss; multiplied by a norm's weight they would not be.

Axes: B rows, D width, H heads, K key/value heads, C width of a head, F width of the feed-forward, N outputs and
I inputs of a matrix.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from multimodal.engine import memory, weights
from multimodal.engine.build import Built, state
from multimodal.engine.quantised import GROUP, int4_codes, int8_codes
from multimodal.engine.runner import Block, Layer, Packed, Row, TorchRunner
from multimodal.engine.weights import GateWeights, rotary_tables
from multimodal.fusion import FusionForConditionalGeneration

Precision = Literal["int8", "int4", "bfloat16"]
KINDS: dict[Precision, int] = {"int8": 0, "int4": 1, "bfloat16": 2}
TILE = 16  # outputs of a tile
INPUTS = 64  # inputs are padded to a multiple of it
PIECE = 4096  # outputs of the head that are packed at a time: whole tiles
SHORT = 48  # tokens of a piece of a prompt up to which steps are sooner done than unpacked matrices


class _CLinear(ctypes.Structure):
    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("input_weight", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class _CLayer(ctypes.Structure):
    _fields_ = (
        *((name, _CLinear) for name in ("qkv", "o", "gate_up", "down")),
        ("attention_gate", ctypes.c_void_p),
        ("feed_forward_gate", ctypes.c_void_p),
    )


class _CModel(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("width", "heads", "kv_heads", "head_dim", "cross_heads", "cross_kv_heads", "cross_head_dim"),
                *("layer_count", "block_count", "slots", "positions", "regions", "query_norm", "embedding_is_float"),
            )
        ),
        ("eps", ctypes.c_double),
        ("layers", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("block_at", ctypes.c_void_p),
        ("head", _CLinear),
        *(
            (name, ctypes.c_void_p)
            for name in ("embedding", "keys", "values", "cross_keys", "cross_values", "cos", "sin")
        ),
    )


class _CRow(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("slot", "token", "position", "first_region", "end_region"))


@cache
def library(path: Path) -> ctypes.CDLL:
    """The compiled code.

    Raises:
        OSError: If it cannot be loaded.
    """
    found = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    for name, result, arguments in (
        ("interleaved", integer, (integer,)),
        ("near", integer, (integer,)),
        ("workspace", pointer, (pointer, integer)),
        ("free", None, (pointer,)),
        ("step", None, (pointer, pointer, pointer, integer, integer, pointer, integer, integer)),
        ("unpack", None, (pointer, pointer, integer, integer)),
        ("has_linear", integer, ()),
        ("linear", None, (pointer, pointer, integer, integer, pointer, integer)),
        ("fit", None, (pointer, integer, pointer, pointer, integer)),
    ):
        function = getattr(found, f"multimodal_{name}")
        function.restype, function.argtypes = result, arguments
    return found


@cache
def _has_linear(code: ctypes.CDLL) -> bool:
    """Whether compiled code reads prompts, too: a processor with AMX."""
    return bool(code.multimodal_has_linear())


def obstacle(model: FusionForConditionalGeneration) -> str | None:
    """Why a model cannot be run by compiled code here, or None where it can."""
    if model.device.type != "cpu":
        return f"it is on {model.device}, and compiled code runs on the CPU"
    if (reason := weights.obstacle(model)) is not None:
        return reason
    found = state()
    return None if isinstance(found, Built) else found


@dataclass(frozen=True)
class Tiles:
    """A packed matrix; called, it is the linear map on activations behind the norm, but before the norm's weight.

    Attributes:
        code: The compiled code.
        kind: The precision.
        tiles: As ``native.cpp`` lays them out.
        scales: Of int8 ``(N,)``, in float32; of int4 ``(N / 16, I / 32, 2, 16)``, in float16.
        input_weight: A norm's weight ``(I,)`` in float32, or None.
        inputs: ``I``, not padded.
        outputs: ``N``, not padded.
        scratch: Where matrices are unpacked, by shape and type; shared by all of a runner.
    """

    code: ctypes.CDLL
    kind: Precision
    tiles: torch.Tensor
    scales: torch.Tensor | None
    input_weight: torch.Tensor | None
    inputs: int
    outputs: int
    scratch: dict[Any, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(part.nbytes for part in (self.tiles, self.scales, self.input_weight) if part is not None)

    @property
    def structure(self) -> _CLinear:
        """For ``native.cpp``."""
        pointers = (None if part is None else part.data_ptr() for part in (self.tiles, self.scales, self.input_weight))
        return _CLinear(*pointers, KINDS[self.kind], _padded(self.inputs, INPUTS), _padded(self.outputs, TILE))

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix ``(N, I)`` in float32 or bfloat16, until the next one of its shape is asked for."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"tiles are unpacked to float32 or bfloat16, not to {dtype}")
        shape = _padded(self.outputs, TILE), _padded(self.inputs, INPUTS)
        if (shape, dtype) not in self.scratch:
            self.scratch[shape, dtype] = torch.empty(shape, dtype=dtype)
        found = self.scratch[shape, dtype]
        is_float, threads = int(dtype == torch.float32), torch.get_num_threads()
        self.code.multimodal_unpack(ctypes.byref(self.structure), found.data_ptr(), is_float, threads)
        return found[: self.outputs, : self.inputs]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States ``(T, I)`` to ``(T, N)``."""
        if states.dtype == torch.bfloat16 and _has_linear(self.code):
            structure, states = self.structure, states.contiguous()
            found = torch.empty(len(states), structure.outputs, dtype=torch.bfloat16)
            self.code.multimodal_linear(
                *(ctypes.byref(structure), states.data_ptr(), *states.shape),
                *(found.data_ptr(), torch.get_num_threads()),
            )
            return found if self.outputs == structure.outputs else found[:, : self.outputs].contiguous()
        if self.input_weight is not None:
            states = states * self.input_weight[: self.inputs].to(states.dtype)
        return functional.linear(states, self.matrix(states.dtype))


def pack_tiles(
    code: ctypes.CDLL,
    weight: torch.Tensor,
    kind: Precision,
    input_weight: torch.Tensor | None = None,
    scratch: dict[Any, torch.Tensor] | None = None,
) -> Tiles:
    """Pack a matrix.

    Args:
        code: The compiled code.
        weight: ``(N, I)``, in float32.
        kind: The precision.
        input_weight: A norm's weight ``(I,)`` that belongs before it, or None.
        scratch: As :class:`Tiles`.
    """
    outputs, inputs = weight.shape
    wide = _padded(inputs, INPUTS)
    if (outputs, inputs) != (_padded(outputs, TILE), wide):
        weight = functional.pad(weight, (0, wide - inputs, 0, _padded(outputs, TILE) - outputs))
    if input_weight is not None:
        input_weight = functional.pad(input_weight.float(), (0, wide - inputs)).contiguous()
    woven = bool(code.multimodal_interleaved(KINDS[kind]))
    pack = {"int8": _pack_int8, "int4": _pack_int4, "bfloat16": _pack_bfloat16}[kind]
    tiles, scales = pack(code, weight, woven)
    return Tiles(code, kind, tiles, scales, input_weight, inputs, outputs, {} if scratch is None else scratch)


def _joined(pieces: Sequence[Tiles]) -> Tiles:
    """Matrices below each other, of which all but the last fill their tiles, as one."""
    scales = [piece.scales for piece in pieces if piece.scales is not None]
    return replace(
        pieces[0],
        tiles=torch.cat([piece.tiles for piece in pieces]),
        scales=torch.cat(scales) if scales else None,
        outputs=sum(piece.outputs for piece in pieces),
    )


def _pack_bfloat16(code: ctypes.CDLL, weight: torch.Tensor, woven: bool) -> tuple[torch.Tensor, None]:
    return _laid_out(weight.bfloat16(), 2 if woven else 1), None


def _pack_int8(code: ctypes.CDLL, weight: torch.Tensor, woven: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = int8_codes(weight)
    return _laid_out(codes.view(torch.uint8) ^ 128, 4 if woven else 1), scales  # 128 more, in bytes without a sign


def _pack_int4(code: ctypes.CDLL, weight: torch.Tensor, woven: bool) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.contiguous().view(-1, GROUP)
    steps, minima = torch.empty(len(groups)), torch.empty(len(groups))
    threads = torch.get_num_threads()
    code.multimodal_fit(groups.data_ptr(), len(groups), steps.data_ptr(), minima.data_ptr(), threads)
    codes, steps, minima = int4_codes(groups, steps, minima)
    codes = codes.view(weight.shape)
    table = torch.stack([steps, minima], -1).view(len(weight) // TILE, TILE, -1, 2)
    if woven:
        first, second = codes.view(len(weight), -1, 2, 4).unbind(2)  # (N, I / 8, 4)
        packed = _laid_out((first | second << 4).flatten(1), 4)
    else:
        first, second = codes.view(len(weight), -1, 2).unbind(2)  # (N, I / 2)
        packed = _laid_out(first | second << 4, 1)
    return packed, table.permute(0, 2, 3, 1).contiguous()  # (N / 16, I / 32, 2, 16)


def _laid_out(matrix: torch.Tensor, together: int) -> torch.Tensor:
    """``(N, I)`` as ``(N / 16, I / together, 16, together)``."""
    tiles = matrix.view(len(matrix) // TILE, TILE, -1, together)
    return tiles.transpose(1, 2).contiguous()


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


class NativeRunner(TorchRunner):
    """Steps and short pieces of a prompt in compiled code; long pieces in torch.

    Args:
        model: A fused model without an :func:`obstacle`; it stays as it is.
        precision: Of the weights. In int4, the head is kept in int8.
        dtype: What long pieces of a prompt are computed in: float32 or bfloat16.
        slots: As :class:`~multimodal.engine.runner.Runner`.
        positions: Likewise.
        pictures: Likewise.
        path: The compiled library; None takes what has been built.

    Raises:
        ValueError: With an obstacle.
    """

    def __init__(
        self,
        model: FusionForConditionalGeneration,
        precision: Precision,
        *,
        dtype: torch.dtype,
        slots: int,
        positions: int,
        pictures: int,
        path: Path | None = None,
    ) -> None:
        reason = obstacle(model) if path is None else weights.obstacle(model)
        if reason is not None:
            raise ValueError(f"this model cannot run in compiled code: {reason}")
        if precision not in KINDS:
            raise ValueError(f"there is no precision {precision!r}: choose one of {', '.join(KINDS)}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"compiled code reads prompts in float32 or bfloat16, not in {dtype}")
        if path is None:
            found = state()
            assert isinstance(found, Built)
            path = found.path
        self.code, self.precision = library(path), precision
        self._near = int(self.code.multimodal_near(KINDS[precision]))
        self._scratch: dict[Any, torch.Tensor] = {}
        self._prepared: dict[str | None, _Prepared] = {}
        super().__init__(model, dtype, slots=slots, positions=positions, pictures=pictures)
        if self.embedding.dtype not in (torch.float32, torch.bfloat16):
            self.embedding = self.embedding.bfloat16()
        self.embedding = self.embedding.contiguous()
        cos, sin = rotary_tables(model, positions)
        half = self.head_dim // 2
        self._cos = cos.contiguous()
        self._sin = torch.cat([-sin[:, :half], sin[:, half:]], -1).contiguous()
        self._block_at = torch.tensor([self.block_at.get(index, -1) for index in range(self.layer_count)])

    @property
    def cache_dtype(self) -> torch.dtype:
        """Keys and values are cached in bfloat16."""
        return torch.bfloat16

    # ---- weights

    def pack(self, weight: torch.Tensor, norm: torch.Tensor | None = None) -> Tiles:
        """Pack a matrix, and count it."""
        return self._tiles(weight, norm, self.precision)

    def _tiles(self, weight: torch.Tensor, norm: torch.Tensor | None, kind: Precision) -> Tiles:
        found = pack_tiles(self.code, weight, kind, norm, self._scratch)
        self._weight_bytes += found.nbytes
        return found

    def pack_gate_up(self, weight: torch.Tensor, norm: torch.Tensor) -> Tiles:
        """Gate and up projection below each other, each padded to whole tiles."""
        parts = weight.chunk(2)
        missing = _padded(len(parts[0]), TILE) - len(parts[0])
        return self.pack(torch.cat([functional.pad(part, (0, 0, 0, missing)) for part in parts]), norm)

    def pack_down(self, weight: torch.Tensor) -> Tiles:
        """Its inputs are padded as the outputs of gate and up are."""
        return self.pack(functional.pad(weight, (0, _padded(weight.shape[1], TILE) - weight.shape[1])))

    def pack_gate(self, gate: GateWeights | None) -> GateWeights | None:
        """Gates are kept in float32."""
        return gate

    def _head(self, adapter: str | None) -> Tiles:
        """In pieces: in float32, all of it would be the largest thing in memory."""
        norm = weights.head_norm(self.model)
        kind: Precision = "bfloat16" if self.precision == "bfloat16" else "int8"
        packed = []
        for start in range(0, len(self.embedding), PIECE):
            weight = weights.matrix(self.model.lm_head, adapter, slice(start, start + PIECE))
            packed.append(self._tiles(weight, norm, kind))
            del weight
            memory.give_back()
        return _joined(packed)

    def _layer(self, index: int, adapter: str | None) -> Layer:
        packed = super()._layer(index, adapter)
        memory.give_back(self.model.model.language_model.layers[index].parameters())  # only traces and `generate` read
        return packed

    def _block_weights(self, index: int, adapter: str | None) -> Block:
        packed = super()._block_weights(index, adapter)
        block: Any = self.model.model.cross_attention_blocks[index]
        memory.give_back(block.feed_forward.parameters())
        return packed

    @staticmethod
    def _weigh(gate: GateWeights | None, normed: torch.Tensor) -> torch.Tensor | float:
        """As :class:`TorchRunner`."""
        if gate is None:
            return 1.0
        return torch.sigmoid(normed @ gate.weight.to(normed.dtype)[:, None] + gate.bias.to(normed.dtype))  # (T, 1)

    # ---- steps

    def _prepare(self, adapter: str | None) -> _Prepared:
        if adapter not in self._prepared:
            self._prepared[adapter] = _Prepared(self, self.packed(adapter))
        return self._prepared[adapter]

    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        """One token in each row, in one call."""
        return self._step(rows, adapter, len(rows))

    def _step(self, rows: Sequence[Row], adapter: str | None, wanted: int) -> torch.Tensor:
        """Rows of one slot are a piece of its text, in order; logits of the last rows, ``(wanted, V)``."""
        prepared = self._prepare(adapter)
        passed = (_CRow * len(rows))()
        for to, row in zip(passed, rows, strict=True):
            if not 0 <= row.slot < self.slots or not 0 <= row.length < self.positions:
                raise ValueError(
                    f"slot {row.slot} with {row.length} tokens: there are {self.slots} of {self.positions}"
                )
            if not 0 <= row.token < len(self.embedding) or not 0 <= row.pictures <= self.pictures:
                raise ValueError(f"token {row.token} behind {row.pictures} pictures is not one of this model's")
            to.slot, to.token, to.position = row.slot, row.token, row.length
            to.first_region, to.end_region = self._span(row.pictures)
        return prepared.step(passed, wanted)

    # ---- prompts

    def read(
        self, slot: int, tokens: Sequence[int], start: int, seen: Sequence[int], adapter: str | None = None
    ) -> torch.Tensor:
        """As :class:`TorchRunner`; a short piece as the steps that its tokens would be, 32 at a time."""
        if len(tokens) > SHORT and start + len(tokens) > self._near:
            return super().read(slot, tokens, start, seen, adapter)
        places = zip(tokens, range(start, start + len(tokens)), seen, strict=True)
        return self._step([Row(slot, *place) for place in places], adapter, 1)[0]

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        return functional.embedding(torch.tensor(tokens), self.embedding).to(self.dtype)


class _Prepared:
    """The structures that compiled code reads for one adapter, what they point to, and its workspace."""

    def __init__(self, runner: NativeRunner, packed: Packed) -> None:
        self.code, self.vocabulary = runner.code, len(runner.embedding)
        self.kept: list[Any] = [packed, runner.embedding, runner.keys, runner.values, runner.cross_keys]
        self.kept += [runner.cross_values, runner._cos, runner._sin, runner._block_at]
        layers = (_CLayer * len(packed.layers))(*(self._structure(layer) for layer in packed.layers))
        blocks = (_CLayer * len(packed.blocks))(*(self._structure(block) for block in packed.blocks))
        self.kept += [layers, blocks]
        head: Any = packed.head
        self.columns = head.structure.outputs
        self.model = _CModel(
            *(runner.embedding.shape[1], runner.heads, runner.kv_heads, runner.head_dim),
            *(runner.cross_heads, runner.cross_kv_heads, runner.cross_head_dim),
            *(len(layers), len(blocks), runner.slots, runner.positions, runner.pictures * runner.latents),
            *(int(runner.query_norm is not None), int(runner.embedding.dtype == torch.float32), runner.eps),
            *(ctypes.addressof(layers), ctypes.addressof(blocks), runner._block_at.data_ptr(), head.structure),
            *(runner.embedding.data_ptr(), runner.keys.data_ptr(), runner.values.data_ptr()),
            *(runner.cross_keys.data_ptr(), runner.cross_values.data_ptr()),
            *(runner._cos.data_ptr(), runner._sin.data_ptr()),
        )
        self.threads = 0
        self.workspace: int | None = None
        self._release: Any = None

    def _structure(self, layer: Layer | Block) -> _CLayer:
        first: Any = layer.qkv if isinstance(layer, Layer) else layer.q
        others: Any = (layer.o, layer.gate_up, layer.down)
        gates = () if isinstance(layer, Layer) else (layer.attention_gate, layer.feed_forward_gate)
        return _CLayer(first.structure, *(tiles.structure for tiles in others), *map(self._gate, gates))

    def _gate(self, gate: GateWeights | None) -> int | None:
        if gate is None:
            return None
        self.kept.append(torch.cat([gate.weight.float().flatten(), gate.bias.float().flatten()]))  # (D + 1,)
        return int(self.kept[-1].data_ptr())

    def step(self, rows: Any, wanted: int) -> torch.Tensor:
        """Logits ``(wanted, V)`` of the last of an array of ``_CRow``."""
        threads = torch.get_num_threads()
        if threads != self.threads:
            if self._release is not None:
                self._release()
            self.workspace = self.code.multimodal_workspace(ctypes.byref(self.model), threads)
            if self.workspace is None:
                raise MemoryError("there is no memory for the workspace of a step")
            self.threads = threads
            self._release = weakref.finalize(self, self.code.multimodal_free, self.workspace)
        logits = torch.empty(wanted, self.columns)
        self.code.multimodal_step(
            *(ctypes.byref(self.model), self.workspace, rows, len(rows), wanted),
            *(logits.data_ptr(), logits.stride(0), threads),
        )
        return logits[:, : self.vocabulary]
