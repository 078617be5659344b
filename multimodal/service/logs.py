"""What is written down about requests: a log for those who run the service, and an audit for those who must account.

What always holds: no picture and no key is written anywhere; what was said only into a log that was asked to hold it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import structlog

from multimodal.adapters import digest_of, weights_of
from multimodal.model import MultiModalModel


class RequestLog:
    """A JSON line for each request.

    Args:
        file: Where to.
        said: Whether questions and answers stand in it, too.
    """

    def __init__(self, file: TextIO, *, said: bool = False) -> None:
        self.said = said
        self._log = structlog.wrap_logger(
            structlog.PrintLogger(file),
            processors=[structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()],
        )

    def write(self, facts: Mapping[str, Any]) -> None:
        """One request's facts."""
        self._log.info("request", **facts)


class AuditLog:
    """Who asked when, what answered, and digests of what was shown and said: a JSON line for each answer.

    A line is on disk before the answer is complete for its caller.

    Args:
        path: Appended to.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._digests: dict[str | None, str] = {}

    def write(
        self,
        model: MultiModalModel,
        *,
        request: str,
        key: str,
        name: str,
        adapter: str | None,
        pictures: Iterable[bytes],
        answers: Sequence[str],
    ) -> None:
        """One request.

        Args:
            model: What answered.
            request: Its id.
            key: The public part of who asked.
            name: What the model is called.
            adapter: Which adapter answered.
            pictures: The files that were shown.
            answers: What was said.
        """
        with self._lock:
            line = {
                "time": datetime.now(UTC).isoformat(),
                "request": request,
                "key": key,
                "model": name,
                "model_digest": self._digest(model, None),
                "adapter_digest": None if adapter is None else self._digest(model, adapter),
                "pictures_sha256": [hashlib.sha256(data).hexdigest() for data in pictures],
                "answers_sha256": [hashlib.sha256(answer.encode()).hexdigest() for answer in answers],
            }
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _digest(self, model: MultiModalModel, adapter: str | None) -> str:
        if adapter not in self._digests:
            self._digests[adapter] = digest_of(model.model) if adapter is None else _of_adapter(model, adapter)
        return self._digests[adapter]


def _of_adapter(model: MultiModalModel, adapter: str) -> str:
    found = hashlib.sha256()
    for layer, pair in sorted(weights_of(model.model, model.switch.names[adapter]).pairs.items()):
        found.update(layer.encode())
        for weight in pair:
            found.update(weight.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()
