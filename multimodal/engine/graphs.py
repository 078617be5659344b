"""Steps as CUDA graphs: one launch for the hundreds of small kernels of a step, on a GPU.

A graph has fixed shapes, so a step is padded: to a number of rows, of positions and of pictures, each of them one of a
few sizes. What always holds: a row that sees no picture leaves the blocks with the bits that it came with, and what
pads a step writes to a slot of its own. On a CPU the same padded step runs without a graph, which is how it is tested.

Axes: B rows with padding, D width, S region tokens, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.engine.runner import Row, TorchRunner
from multimodal.fusion import FusionForConditionalGeneration

FEWEST_POSITIONS = 256


@dataclass(frozen=True)
class Shape:
    """What is fixed in a graph.

    Attributes:
        rows: With padding.
        positions: That are looked at in each row's cache.
        pictures: Likewise; with 0 there are no blocks in it.
        adapter: Whose weights it reads.
    """

    rows: int
    positions: int
    pictures: int
    adapter: str | None


def doubled(first: int, most: int) -> list[int]:
    """Sizes that double, the last of them ``most``."""
    sizes = [min(first, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class GraphRunner(TorchRunner):
    """Torch operators, recorded once for each shape of a step and replayed from then on.

    Memory of all slots is taken at once. Recording takes a fraction of a second, when a shape is first met.

    Args:
        model: As :class:`TorchRunner`.
        dtype: Likewise.
        **options: Likewise.
    """

    spare_slots = 1

    def __init__(self, model: FusionForConditionalGeneration, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(model, dtype, **options)
        self._row_sizes = doubled(1, self.slots)
        self._position_sizes = doubled(FEWEST_POSITIONS, self.positions)
        self._picture_sizes = [0, *doubled(1, self.pictures)]
        # Of each row: slot, token, position, first region token that is seen, and the one behind the last.
        self._inputs = torch.zeros((self.slots, 5), dtype=torch.long, device=self.device)
        self._logits = torch.zeros((self.slots, len(self.embedding)), dtype=dtype, device=self.device)
        self._graphs: dict[Shape, Any] = {}
        self._pool: Any = None
        self._stream: Any = None  # one for all recordings: libraries keep a workspace for each stream

    def prepare(self) -> None:
        """Pack the weights, and record the steps of short conversations with one picture and with none."""
        super().prepare()
        for rows in self._row_sizes:
            for pictures in self._picture_sizes[:2]:
                self._set_inputs([], rows)
                self._run(Shape(rows, self._position_sizes[0], pictures, None))

    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        """One token in each row."""
        shape = self.shape(rows, adapter)
        self._set_inputs(rows, shape.rows)
        self._run(shape)
        return self._logits[: len(rows)].to(torch.float32, copy=True)

    def shape(self, rows: Sequence[Row], adapter: str | None = None) -> Shape:
        """The smallest shape that rows fit into."""
        most = (len(rows), max(row.length for row in rows) + 1, max(row.pictures for row in rows))
        sizes = (self._row_sizes, self._position_sizes, self._picture_sizes)
        count, positions, pictures = (
            next(size for size in some if size >= least) for some, least in zip(sizes, most, strict=True)
        )
        return Shape(count, positions, pictures, adapter)

    def _set_inputs(self, rows: Sequence[Row], count: int) -> None:
        """Say what is in the rows; the others read token 0 in the spare slot."""
        found = [(row.slot, row.token, row.length, *self._span(row.pictures)) for row in rows]
        found += [(self.slots, 0, 0, 0, 0)] * (count - len(rows))
        self._inputs[:count] = torch.tensor(found)

    def _run(self, shape: Shape) -> None:
        """Write the logits of ``_inputs`` to ``_logits``."""
        if self.device.type != "cuda":
            self._compute(shape)
            return
        with torch.cuda.device(self.device):
            if shape not in self._graphs:
                self._graphs[shape] = self._record(shape)
            self._graphs[shape].replay()

    def _record(self, shape: Shape) -> Any:
        """A graph. Graphs share their memory: they run one after another, and what they leave is in ``_logits``."""
        self.packed(shape.adapter)
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # once without a graph: libraries choose and load their kernels
            self._compute(shape)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._compute(shape)
        return graph

    def _compute(self, shape: Shape) -> None:
        """The padded step: nothing in it hangs on a number that only the CPU knows."""
        packed = self.packed(shape.adapter)
        slots, tokens, places, first, end = self._inputs[: shape.rows].T.contiguous()  # (B,) each
        mask = self._mask(torch.arange(shape.positions, device=self.device) <= places[:, None])
        sees = (end > 0)[:, None]  # (B, 1)
        last = shape.pictures * self.latents
        regions = torch.arange(last, device=self.device)
        seen = (regions >= first[:, None]) & (regions < end[:, None])  # (B, S)
        # Softmax over nothing is NaN: who sees nothing looks at everything, and what comes of it is discarded.
        region_mask = self._mask(seen | ~sees)

        def see(at: int, states: torch.Tensor) -> torch.Tensor:
            if not last:
                return states
            keys, values = (cache[at, slots, :, :last].to(self.dtype) for cache in (self.cross_keys, self.cross_values))
            return torch.where(sees, self._block(states, packed.blocks[at], keys, values, region_mask), states)

        states = self.embedding[tokens].to(self.dtype)
        self._logits[: shape.rows] = self._decode(packed, states, slots, places, mask, see)

    def _mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """``(B, P)`` as what is added to scores ``(B, 1, 1, P)``: made once, it serves all layers."""
        added = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return added.masked_fill_(~allowed, -torch.inf)[:, None, None]
