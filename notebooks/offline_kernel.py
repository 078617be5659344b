"""A Jupyter kernel that reaches nothing but this machine.

Run as a file by ``execute.py``. A connection elsewhere is refused, and written to the file that ``MULTIMODAL_REFUSED``
names: libraries swallow the refusal, and a notebook must fail even if its code carried on.
"""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

REFUSED = "MULTIMODAL_REFUSED"


def is_local(family: int, address: Any) -> bool:
    """Whether a socket's address is on this machine; a name would have to be looked up."""
    if family == getattr(socket, "AF_UNIX", None) or str(address[0]) == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(address[0])).is_loopback
    except ValueError:
        return False


def shut_network() -> None:
    """Make every connection to another machine fail from now on."""
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, original: Any = original) -> Any:
            if not is_local(self.family, address):
                if os.environ.get(REFUSED):
                    with Path(os.environ[REFUSED]).open("a", encoding="utf-8") as file:
                        file.write(f"{address}\n")
                raise ConnectionRefusedError(
                    f"notebooks are executed without a network, and this connects to {address}"
                )
            return original(self, address)

        setattr(socket.socket, name, guarded)


if __name__ == "__main__":
    from ipykernel import kernelapp

    shut_network()
    kernelapp.launch_new_instance()
