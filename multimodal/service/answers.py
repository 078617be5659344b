"""Answers that are kept: the same question about the same pictures, asked in the same way, is not computed again.

The same is what differs in nothing but white space and how characters are composed. Only answers that would come out
the same are kept: greedy ones, and those with a seed.
"""

from __future__ import annotations

import hashlib
import json
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multimodal.engine import Generation
from multimodal.images import Encoded
from multimodal.service.schema import ChatRequest


class AnswerCache:
    """Finished answers, by what was asked. When it is full, what was not asked for the longest goes.

    Args:
        most: How many; 0 keeps none.

    Attributes:
        hits: How often an answer was there.
        misses: How often it was not.
    """

    def __init__(self, most: int) -> None:
        self.most, self.hits, self.misses = most, 0, 0
        self._kept: OrderedDict[str, list[Generation]] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, asked: ChatRequest, chat: Sequence[Mapping[str, Any]]) -> str | None:
        """Names what is asked; None if its answer is not kept."""
        if self.most <= 0 or (asked.temperature > 0 and asked.seed is None):
            return None
        options = asked.model_dump(exclude={"messages", "metadata", "stream", "stream_options"})
        said = [[message["role"], [_normal(part) for part in message["content"]]] for message in chat]
        return hashlib.sha256(json.dumps([options, said], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> list[Generation] | None:
        """The answers to a question, if they are there."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._kept.move_to_end(key)
            return found

    def put(self, key: str, generations: Sequence[Generation]) -> None:
        """Keep answers, without their pictures."""
        kept = [
            Generation(replace(its.request, pictures=()), list(its.tokens), its.reason, reused=its.reused)
            for its in generations
        ]
        with self._lock:
            self._kept[key] = kept
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)


def _normal(part: Mapping[str, Any]) -> str:
    if part["type"] == "text":
        return "text " + " ".join(unicodedata.normalize("NFC", part["text"]).split())
    image: Encoded = part["image"]
    return "image " + hashlib.sha256(image.data).hexdigest()
