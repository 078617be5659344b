"""The constants of a frozen decoder, computed once and kept on disk.

With a decoder that is wholly frozen, the keys and values of the tokens in front of a row's first picture, and the
states with which the rest of the row enters the first layer that has a block, are the same in every epoch and for every
picture (see ``fusion/prefix.py``). Where layers from there on learn, as with LoRA, the states still are, those of the
whole row: its prefix has no tokens. What always holds: a file's name is a digest of all that decides its content but
the tokens, and each record in it names its tokens; records are only ever appended, each distinct prefix and each
distinct row once, so a second run computes what is new and nothing else; a process that is stopped goes on behind its
last whole batch, with the same batches and so the same bytes; one that comes second waits.

Axes: B batch, N decoder layers from the first with a block on, K key/value heads, P prefix tokens, T suffix tokens,
C width of a head, D width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.prefix import prefix_obstacle
from multimodal.training.processes import at_a_time

BATCH_TOKENS = 512  # tokens at a time, in rows of about one length; what follows a row's end does not reach it

# A record's head: digest of its tokens, how many tokens have numbers, how many records of its batch come behind it.
HEAD = struct.Struct("<32sII")

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PrefixEntry:
    """What is known of one row before a step.

    Attributes:
        keys: ``(N, K, P, C)``.
        values: ``(N, K, P, C)``.
        states: ``(T, D)``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    states: torch.Tensor


def suffix_start(input_ids: Sequence[int], image_token_id: int) -> int | None:
    """Where a row's first picture stands; None if it has none."""
    return input_ids.index(image_token_id) if image_token_id in input_ids else None


def can_keep_prefixes(model: FusionForConditionalGeneration) -> bool:
    """Whether the decoder's numbers are constants in training: it is wholly frozen, and can go on from them."""
    decoder = model.model.language_model
    return not any(p.requires_grad for p in decoder.parameters()) and prefix_obstacle(decoder) is None


def can_keep_states(model: FusionForConditionalGeneration) -> bool:
    """Whether the states with which rows enter the first layer with a block are constants: what is below is frozen."""
    decoder, first = model.model.language_model, model.config.cross_attention_layers[0]
    lower = _LowerLayers(decoder, first).layers
    return not any(p.requires_grad for p in lower.parameters()) and prefix_obstacle(decoder) is None


class PrefixCache:
    """Keys and values of prefixes and states of suffixes, for a set of rows.

    Args:
        folder: Where the cache files live.
        model: The fused model. Where its decoder is wholly frozen a row's suffix starts at its first picture, otherwise
            at the row's beginning.
        rows: Token ids of whole rows, each with a picture's placeholder if the decoder is wholly frozen.

    Raises:
        ValueError: If a row has no placeholder, or the decoder can not go on behind a prefix.
    """

    def __init__(self, folder: Path, model: FusionForConditionalGeneration, rows: Iterable[Sequence[int]]) -> None:
        decoder = model.model.language_model
        obstacle = prefix_obstacle(decoder)
        if obstacle is not None:
            raise ValueError(f"this decoder can not go on behind a prefix: {obstacle}")
        self.dtype, first = decoder.dtype, model.config.cross_attention_layers[0]
        lower, frozen = _LowerLayers(decoder, first), can_keep_prefixes(model)
        self.image_token_id = model.config.image_token_id if frozen else None
        text = decoder.config
        layers, heads = text.num_hidden_layers - first, text.num_key_value_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._prefix_shape, self._suffix_shape = (2, layers, heads, -1, width), (-1, text.hidden_size)

        distinct = dict.fromkeys(tuple(row) for row in rows)
        prefixes = dict.fromkeys(row[: self._start(row)] for row in distinct)
        file = folder / _key(decoder if frozen else lower.layers, first, self.image_token_id)
        size = torch.empty((), dtype=self.dtype).element_size()
        folder.mkdir(parents=True, exist_ok=True)
        self._prefixes = _Records(file.with_suffix(".prefixes"), 2 * layers * heads * width * size)
        self._suffixes = _Records(file.with_suffix(".suffixes"), text.hidden_size * size)

        training = decoder.training
        decoder.eval()
        with FileLock(file.with_suffix(".lock")), torch.no_grad():
            self._prefixes.fill(
                [prefix for prefix in prefixes if prefix],
                lambda batch: _keys_and_values(decoder, first, batch),
                what="frozen prefixes",
                start=lambda _: 0,
            )
            self._suffixes.fill(
                distinct,
                lambda batch: lower.states(batch, self._start(batch[0])),
                what="frozen suffixes",
                start=self._start,
            )
        decoder.train(training)

    def _start(self, row: Sequence[int]) -> int:
        if self.image_token_id is None:
            return 0
        start = suffix_start(row, self.image_token_id)
        if start is None:
            raise ValueError("a row without a picture has no prefix: its tokens learn nothing from a frozen decoder")
        return start

    def __getitem__(self, row: Sequence[int]) -> PrefixEntry:
        """What is known of a row, by its token ids."""
        row = tuple(row)
        prefix = row[: self._start(row)]
        if prefix:
            keys, values = self._prefixes.read(prefix).view(self.dtype).view(self._prefix_shape)
        else:
            empty = (*self._prefix_shape[1:3], 0, self._prefix_shape[-1])
            keys = values = torch.empty(empty, dtype=self.dtype)
        return PrefixEntry(keys, values, self._suffixes.read(row).view(self.dtype).view(self._suffix_shape))


class _Records:
    """One append-only file of records, each a head and its numbers, and where they stand in it.

    Args:
        file: The file, made if needed.
        token_bytes: Bytes of one token's numbers.
    """

    def __init__(self, file: Path, token_bytes: int) -> None:
        self.file, self.token_bytes = file, token_bytes
        self._places: dict[bytes, tuple[int, int]] = {}  # digest: start and end of the numbers
        self._bytes = np.empty(0, np.uint8)

    def fill(
        self,
        jobs: Iterable[Tokens],
        compute: Callable[[Sequence[Tokens]], list[torch.Tensor]],
        *,
        what: str,
        start: Callable[[Tokens], int],
    ) -> None:
        """Compute what is not there yet. To be called under the files' lock, as it cuts off what is not whole.

        Args:
            jobs: Tokens.
            compute: The numbers of a batch of jobs, the longest last, that start at one place.
            what: Names the bar.
            start: Where a job's tokens with numbers start.
        """
        with self.file.open("a+b") as stream:
            stream.truncate(self._scan(stream))
            wanted = [(digest, job) for job in jobs if (digest := _tokens_digest(job)) not in self._places]
            wanted.sort(key=lambda job: (start(job[1]), len(job[1]), job[0]))  # whatever is done already
            with tqdm(total=len(wanted), desc=what, disable=not wanted) as progress:
                for batch in _batches(wanted, start):
                    numbers = [_bytes(tensor) for tensor in compute([job for _, job in batch])]
                    left = range(len(batch) - 1, -1, -1)
                    for (digest, _), number, behind in zip(batch, numbers, left, strict=True):
                        stream.write(HEAD.pack(digest, len(number) // self.token_bytes, behind) + number)
                    stream.flush()
                    progress.update(len(batch))
            self._scan(stream)
            if stream.seek(0, 2):
                self._bytes = np.memmap(self.file, np.uint8, mode="r")

    def _scan(self, stream: BinaryIO) -> int:
        """Note where records stand; returns the end of the last whole batch."""
        size, end, at = stream.seek(0, 2), 0, 0
        places: dict[bytes, tuple[int, int]] = {}
        while at + HEAD.size <= size:
            stream.seek(at)
            digest, tokens, left = HEAD.unpack(stream.read(HEAD.size))
            start, at = at + HEAD.size, at + HEAD.size + tokens * self.token_bytes
            if at > size:
                break
            places[digest] = (start, at)
            if not left:
                end = at
                self._places |= places
                places = {}
        return end

    def read(self, tokens: Tokens) -> torch.Tensor:
        """Bytes of a record's numbers."""
        start, end = self._places[_tokens_digest(tokens)]
        return torch.from_numpy(np.array(self._bytes[start:end]))


def _batches(
    jobs: Iterable[tuple[bytes, Tokens]], start: Callable[[Tokens], int]
) -> Iterator[list[tuple[bytes, Tokens]]]:
    """Cut sorted jobs into batches that start at one place and are no longer, once padded, than is done at a time."""
    most = at_a_time(BATCH_TOKENS)
    batch: list[tuple[bytes, Tokens]] = []
    for digest, job in jobs:
        begin = start(job)
        if batch and (start(batch[0][1]) != begin or (len(batch) + 1) * (len(job) - begin) > most):
            yield batch
            batch = []
        batch.append((digest, job))
    if batch:
        yield batch


def _padded(rows: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    """Token ids ``(B, T)``; a causal decoder's states do not hang on what stands behind a row's end."""
    longest = max(map(len, rows))
    return torch.tensor([(*row, *[0] * (longest - len(row))) for row in rows], device=device)


def _tokens_digest(tokens: Tokens) -> bytes:
    return hashlib.sha256(np.array(tokens, "<i4").tobytes()).digest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _key(decoder: Any, first: int, image_token_id: int | None) -> str:
    """Names a decoder, or its layers below ``first``, and where suffixes start."""
    config = decoder.config.to_dict()
    for name in ("_name_or_path", "name_or_path", "use_cache", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    settings = {"decoder": config, "first": first, "image token": image_token_id, "dtype": str(decoder.dtype)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in decoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def _keys_and_values(decoder: Any, first: int, batch: Sequence[Tokens]) -> list[torch.Tensor]:
    """Of each prefix: ``(2, N, K, P, C)``."""
    layers = decoder(input_ids=_padded(batch, decoder.device), use_cache=True).past_key_values.layers[first:]
    kinds = [torch.stack([getattr(layer, kind) for layer in layers], dim=1) for kind in ("keys", "values")]
    both = torch.stack(kinds, dim=1)  # (B, 2, N, K, P, C)
    return [numbers[..., : len(row), :] for numbers, row in zip(both, batch, strict=True)]


class _LowerLayers:
    """The decoder's layers below ``first``, which go on behind prefixes; the prefixes of one length are kept.

    Args:
        decoder: The decoder, without its head.
        first: The first layer with a block.
    """

    def __init__(self, decoder: Any, first: int) -> None:
        self.first, self.layers = first, copy.copy(decoder)  # the weights are shared
        self.layers._modules = dict(decoder._modules)
        self.layers.layers, self.layers.norm = nn.ModuleList(decoder.layers[:first]), nn.Identity()
        self._kept: dict[Tokens, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._length = 0

    def states(self, batch: Sequence[Tokens], start: int) -> list[torch.Tensor]:
        """Of each row: the states ``(T, D)`` behind the lower layers, from ``start`` on."""
        if start != self._length:
            self._kept, self._length = {}, start
        cache = DynamicCache()
        if start:
            prefixes = [row[:start] for row in batch]
            self._read(list(dict.fromkeys(prefix for prefix in prefixes if prefix not in self._kept)))
            for index in range(self.first):
                kept = [self._kept[prefix][index] for prefix in prefixes]
                cache.update(
                    torch.stack([keys for keys, _ in kept]), torch.stack([values for _, values in kept]), index
                )
        suffixes = [row[start:] for row in batch]
        ids = _padded(suffixes, self.layers.device)
        states = self.layers(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return [its[: len(row)] for its, row in zip(states, suffixes, strict=True)]

    def _read(self, prefixes: Sequence[Tokens]) -> None:
        size = max(at_a_time(BATCH_TOKENS) // max(self._length, 1), 1)
        for at in range(0, len(prefixes), size):
            some = prefixes[at : at + size]
            layers = self.layers(
                input_ids=torch.tensor(some, device=self.layers.device), use_cache=True
            ).past_key_values.layers
            for row, prefix in enumerate(some):
                self._kept[prefix] = [(layer.keys[row], layer.values[row]) for layer in layers[: self.first]]
