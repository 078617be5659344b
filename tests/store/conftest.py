"""A real PostgreSQL, for as long as the tests run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PLACES = ["", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]


def binary(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def as_somebody(*command: str) -> list[str]:
    """PostgreSQL does not run as root: if we are, somebody else has to."""
    return [*(["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []), *command]


class Postgres:
    """A server of its own, with an empty database; it can go away and come back.

    Args:
        folder: Holds everything of it.
    """

    def __init__(self, folder: Path) -> None:
        initdb, server = binary("initdb"), binary("postgres")
        if initdb is None or server is None:
            pytest.skip("no PostgreSQL is installed")
        if os.getuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        self._folder, self._log = folder, folder / "log"
        data = str(folder / "data")
        subprocess.run(
            as_somebody(initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8"),
            check=True,
            capture_output=True,
            cwd=folder,
        )
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        self._command = as_somebody(server, "-D", data, "-p", str(port), "-k", str(folder), *settings)

    def start(self) -> None:
        """Start, and wait until it answers."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stderr=log, cwd=self._folder)
        while "ready to accept connections" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """Go away at once, as in a crash: connections break, and what was begun is lost."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def freeze(self) -> None:
        """Be there without a word: connections stay, and nobody is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after :meth:`freeze`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        server = self._process.pid
        for pid in (server, *map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())):
            os.kill(pid, number)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A server that runs; who stops it starts it again."""
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """The URL of a database."""
    return postgres_server.url
