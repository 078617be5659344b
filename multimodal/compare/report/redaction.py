"""A report is passed on: keys and passwords that stand in a command, in settings or in an error are left out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_SECRET = r"(?:api[-_]?key|secret|password|passwd|authorization|bearer|(?<![a-z])token)"
_NAME = re.compile(rf"(?:{_SECRET}|(?:^|[-_])key)$", re.IGNORECASE)
_FLAG = re.compile(
    rf"(--[\w-]*(?:{_SECRET}|-key|--key)|\b\w*(?:{_SECRET}|_key))(\s*[= ]\s*)(?!-)[^\s)\]}}\"',;]+", re.IGNORECASE
)
_BARE = re.compile(r"\b(?:sk|pk|hf|gsk|xai)[-_][A-Za-z0-9_-]{8,}|(?<=Bearer )\S+")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(text: str) -> str:
    """The text, with what looks like a key, a token or a login replaced."""
    text = _FLAG.sub(lambda found: f"{found[1]}{found[2]}{HIDDEN}", text)
    return _LOGIN.sub("", _BARE.sub(HIDDEN, text))


def setting(name: str, value: object) -> str:
    """A setting as text."""
    cleared = _clear(name, value)
    if isinstance(cleared, str):
        return cleared
    return without_secrets(json.dumps(cleared, default=str, ensure_ascii=False))


def _clear(name: str, value: Any) -> Any:
    if _NAME.search(name) and value:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): _clear(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clear("", item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
