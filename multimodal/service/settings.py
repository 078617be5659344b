"""What a service allows, and how long it has patience: one frozen object with defaults for one machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a service.

    Attributes:
        body_bytes: Of a request. The default holds a picture of 24 MB, or many small ones.
        pictures: In a request, those of its session included.
        pixels: Of a picture. The default is above a phone's photograph at full size but for the largest.
        decode_seconds: For which a picture is decoded, at most.
        characters: Of all texts of a request together; the model's own limit, in tokens, is behind it.
        answer_tokens: That a request may ask for.
        choices: That a request may ask for (``n``).
        held_bytes: Of the bodies of all requests that are being read, wait or are answered.
        waiting: Requests that wait for their turn.
        queue_seconds: For which one waits, at most.
        answer_seconds: That an answer may take, at most.
        grace_seconds: For which a server that is told to stop finishes what it has begun.
        allowed_hosts: Names of hosts from which pictures are fetched; none by default.
        cached_answers: How many answers are kept for the same question about the same picture; none by default, since
            an answer may be medical.
        keep_days: After which sessions and pictures go that nobody asked about.
        kept_picture_bytes: Of all pictures of sessions; those go first that were not asked about for longest.
    """

    body_bytes: int = 32 * 2**20
    pictures: int = 32
    pixels: int = 50_000_000
    decode_seconds: float = 10.0
    characters: int = 200_000
    answer_tokens: int = 2048
    choices: int = 8
    held_bytes: int = 2**30
    waiting: int = 256
    queue_seconds: float = 60.0
    answer_seconds: float = 300.0
    grace_seconds: float = 20.0
    allowed_hosts: frozenset[str] = frozenset()
    cached_answers: int = 0
    keep_days: float = 30.0
    kept_picture_bytes: int = 2 * 2**30
