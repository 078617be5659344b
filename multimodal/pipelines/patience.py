"""Asking again where a model may answer a moment later: a busy endpoint, a broken connection.

Chats and pipelines try once and say whether another try may help (``PipelineError.passing``); whoever runs many
questions waits here, so that nobody waits twice over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from multimodal.pipelines.protocol import PipelineError

FIRST_WAIT = 1.0  # seconds before the second try; twice as long before each further one
LONGEST_WAIT = 60.0

T = TypeVar("T")


def patiently(ask: Callable[[], T], *, tries: int, pause: Callable[[float], object] | None = None) -> T:
    """Ask; after an error that may pass ask again, later each time, and not before the time that an endpoint asks for.

    Args:
        ask: One try.
        tries: At most so many.
        pause: Waits so many seconds; it may raise, to end the waiting. None sleeps.

    Raises:
        PipelineError: That of the last try, or the first one that does not pass.
    """
    wait = FIRST_WAIT
    for _ in range(tries - 1):
        try:
            return ask()
        except PipelineError as error:
            if not error.passing:
                raise
            wait = max(wait, error.retry_after or 0.0)
        (pause or time.sleep)(min(wait, LONGEST_WAIT))
        wait *= 2
    return ask()
