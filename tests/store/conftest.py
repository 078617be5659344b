"""A real PostgreSQL, for as long as the tests run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLACES = ["", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]


def binary(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def as_somebody(*command: str) -> list[str]:
    """PostgreSQL does not run as root: if we are, somebody else has to."""
    return [*(["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []), *command]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of an empty database."""
    pytest.importorskip("psycopg")
    initdb, server = binary("initdb"), binary("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL is installed")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if os.getuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        data = str(Path(folder) / "data")
        subprocess.run(
            as_somebody(initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8"),
            check=True,
            capture_output=True,
            cwd=folder,
        )
        listener.close()
        options = ["-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        process = subprocess.Popen(as_somebody(server, *options), stderr=subprocess.PIPE, text=True, cwd=folder)
        try:
            assert process.stderr is not None
            lines = []
            while "ready to accept connections" not in (line := process.stderr.readline()):
                lines.append(line)
                assert line, "".join(lines)
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.communicate()
