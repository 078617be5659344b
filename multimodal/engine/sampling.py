"""From logits to a token, and from tokens to text that ends before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream


class Sampler:
    """Picks tokens for one request.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: Nucleus: Holtzman et al., "The curious case of neural text degeneration", 2020, section 3.1.
        seed: Of its random numbers.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int) -> None:
        # Beyond these, float32 has no shares any more; up to them, an answer is greedy or pure chance already.
        self.temperature, self.top_p = min(max(temperature, 1e-6), 1e6), top_p
        self._chance = torch.Generator().manual_seed(seed) if temperature > 0 else None

    def pick(self, scores: Scores, row: int) -> tuple[int, float]:
        """A token of one row, and its log-probability at temperature 1."""
        if self._chance is None:
            return scores.likeliest[row], scores.logprobs[row]
        shares = (scores.logits[row].cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, places = shares.sort(descending=True)
            ordered[1:][ordered.cumsum(-1)[:-1] >= self.top_p] = 0  # the first always stays
            token = int(places[torch.multinomial(ordered, 1, generator=self._chance)])
        else:
            token = int(torch.multinomial(shares, 1, generator=self._chance))
        passed = scores.logits[row, token] - scores.logits[row, scores.likeliest[row]]
        return token, scores.logprobs[row] + float(passed)


class Scores:
    """Logits of all rows of a step, and what greedy rows need of them, computed for all at once.

    Args:
        logits: ``(B, V)``, float32.
        suppressed: Tokens that cannot be said.

    Attributes:
        likeliest: Of each row, a token.
        logprobs: Of each row, that token's log-probability.
    """

    def __init__(self, logits: torch.Tensor, suppressed: Sequence[int] = ()) -> None:
        for token in suppressed:
            logits[:, token] = -torch.inf
        self.logits = logits
        top, likeliest = logits.max(-1)
        self.likeliest: list[int] = likeliest.tolist()
        self.logprobs: list[float] = (top - logits.logsumexp(-1)).tolist()

    def top(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of a row and their log-probabilities at temperature 1, the likeliest first."""
        if not count:
            return ()
        logits, tokens = self.logits[row].topk(min(count, self.logits.shape[-1]))
        logprobs = logits - logits[0] + self.logprobs[row]
        return tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True))


class TextStream:
    """Tokens to text as they come: whole characters, and nothing of a stop string.

    Args:
        tokenizer: A fast tokenizer of transformers.
        stop: Strings that end the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop, self._held = [string for string in stop if string], ""
        self._ids: list[int] = []
        self._decoded = 0  # characters
        self.stopped = False

    def add(self, token: int) -> str:
        """What a token adds; once ``stopped``, nothing does."""
        self._ids.append(token)
        return self._say(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")

    def flush(self) -> str:
        """What was held back: for a stop string that did not come, or for the rest of a character."""
        if self.stopped:
            return ""
        said = self._say(self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._decoded :])
        return said + ("" if self.stopped else self._held)

    def _say(self, text: str) -> str:
        self._decoded += len(text)
        self._held += text
        ends = [place for string in self._stop if (place := self._held.find(string)) >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = max((_overlap(self._held, string) for string in self._stop), default=0)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return said


def _overlap(text: str, string: str) -> int:
    """How long the longest end of a text is that a string begins with."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
