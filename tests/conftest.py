"""What holds for every test: no network, no telemetry, few threads.

The settings are made here, before anything imports torch, transformers or gradio, and reach child processes too.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings

import pytest


class NetworkGuard:
    """Refuses connections to anything but this machine, and remembers who tried.

    It remembers because libraries swallow the refusal: a test must fail even if its own code carried on.
    """

    def __init__(self) -> None:
        self.attempts: list[str] = []

    def check(self, family: int, address: Any) -> None:
        if family == socket.AF_UNIX or is_loopback(address):
            return
        self.attempts.append(str(address))
        raise ConnectionRefusedError(f"the tests use no network, but something connects to {address}")


def is_loopback(address: Any) -> bool:
    host = str(address[0])
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which would have to be looked up
        return False


@pytest.fixture(scope="session", autouse=True)
def settled_heap() -> None:
    """What is imported stays: ``Trainer`` collects garbage whenever it begins, half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def network_guard() -> Iterator[NetworkGuard]:
    guard = NetworkGuard()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            original = getattr(socket.socket, name)

            def guarded(self: socket.socket, address: Any, original: Any = original) -> Any:
                guard.check(self.family, address)
                return original(self, address)

            patch.setattr(socket.socket, name, guarded)
        yield guard


@pytest.fixture(autouse=True)
def no_network(network_guard: NetworkGuard) -> Iterator[None]:
    network_guard.attempts.clear()
    yield
    assert not network_guard.attempts, f"the test connected to {network_guard.attempts}"
