"""From logits to a token, and from tokens to text that ends before a stop string."""

from __future__ import annotations

import math
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
        repetition_penalty: Keskar et al., "CTRL", 2019, section 4.1; 1 for none.
        prompt: The tokens that it holds for, and those that are picked.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        seed: int,
        repetition_penalty: float = 1.0,
        prompt: Sequence[int] = (),
    ) -> None:
        # Beyond these, float32 has no shares any more; up to them, an answer is greedy or pure chance already.
        self.temperature, self.top_p = min(max(temperature, 1e-6), 1e6), top_p
        self.repetition_penalty = repetition_penalty
        self._chance = torch.Generator().manual_seed(seed) if temperature > 0 else None
        self._known = set(prompt) if repetition_penalty != 1 else None

    def pick(self, scores: Scores, row: int) -> tuple[int, float]:
        """A token of one row, and its log-probability at temperature 1 and without a penalty."""
        if self._chance is None and self._known is None:
            return scores.likeliest[row], scores.logprobs[row]
        token = self._choose(self._penalised(scores.logits[row].cpu()))
        if self._known is not None:
            self._known.add(token)
        passed = scores.logits[row, token] - scores.logits[row, scores.likeliest[row]]
        return token, scores.logprobs[row] + float(passed)

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``(V,)`` with those of known tokens pushed down."""
        if not self._known:
            return logits
        known = torch.tensor(sorted(self._known))
        found = logits[known]
        found = torch.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
        return logits.scatter(0, known, found)

    def _choose(self, logits: torch.Tensor) -> int:
        if self._chance is None:
            return int(logits.argmax())
        shares = (logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, places = shares.sort(descending=True)
            ordered[1:][ordered.cumsum(-1)[:-1] >= self.top_p] = 0  # the first always stays
            return int(places[torch.multinomial(ordered, 1, generator=self._chance)])
        return int(torch.multinomial(shares, 1, generator=self._chance))


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
        self.logits, self._logprobs = logits, logits.log_softmax(-1)
        # On a CPU, torch would have its threads share each row, and wake them for that: longer than the search takes.
        likeliest = torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
        self.likeliest: list[int] = likeliest.tolist()
        self.logprobs: list[float] = self._logprobs.gather(-1, likeliest[:, None])[:, 0].tolist()

    def top(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of one row that can be said, and their log-probabilities, the likeliest first."""
        if not count:
            return ()
        logprobs, tokens = self._logprobs[row].topk(min(count, self.logits.shape[-1]))
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        return tuple(pair for pair in pairs if pair[1] > -math.inf)


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
