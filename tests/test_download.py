"""Pictures of allowed hosts, on an internet of our own: names and routes are faked, the server is real.

What is replaced is the operating system's resolver and its way out, which a test cannot have; every address that is
connected to is written down.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from multimodal.download import download, is_public
from multimodal.images import ImageError

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
RESOLVE, CONNECT = socket.getaddrinfo, socket.create_connection


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"picture of {self.headers['Host']}".encode())

    def log_message(self, *_: Any) -> None:
        pass


class Internet:
    """Names and where they lead; one with several lists leads elsewhere each time it is asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.names: dict[str, list[list[str]]] = {}
        self.connected: list[str] = []

    def resolve(self, host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        answers = self.names.get(str(host).lower().rstrip("."))
        if answers is None:
            return RESOLVE(host, port, *arguments, **options)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [info for address in addresses for info in RESOLVE(address, port, type=socket.SOCK_STREAM)]

    def connect(self, address: tuple[str, int], *arguments: Any) -> socket.socket:
        self.connected.append(address[0])
        return CONNECT(("127.0.0.1", self.port), *arguments)


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    internet = Internet(server.server_port)
    internet.names = {"shop.example": [[PUBLIC]], "cdn.example": [[OTHER]]}
    monkeypatch.setattr(socket, "getaddrinfo", internet.resolve)
    monkeypatch.setattr(socket, "create_connection", internet.connect)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would resolve the name again, somewhere else
    yield internet
    server.shutdown()
    server.server_close()


def refused(url: str, *hosts: str) -> str:
    with pytest.raises(ImageError) as caught:
        download(url, max_bytes=1000, hosts=hosts)
    return str(caught.value)


def test_an_allowed_host_is_asked_at_the_address_that_was_checked(internet: Internet) -> None:
    hosts = {"shop.example", "cdn.example"}
    for url in ("http://shop.example/a.png", "http://SHOP.example./a.png"):
        assert download(url, max_bytes=1000, hosts=hosts)[1].lower().startswith(b"picture of shop.example")
    assert download("http://shop.example/to/http://cdn.example/", max_bytes=1000, hosts=hosts)[1] == (
        b"picture of cdn.example"
    )
    assert set(internet.connected) == {PUBLIC, OTHER}


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "http://shop.example.evil.example/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://0x7f.1/",
        "http://localhost/",
        "http://shop.example/to/http://127.0.0.1/",
        "http://shop.example/to/http://2130706433/",
        "http://shop.example/to/http://other.example/",
    ],
)
def test_other_hosts_are_refused_in_every_spelling_and_behind_redirects(internet: Internet, url: str) -> None:
    assert "is of a host that is not allowed. Send the picture itself" in refused(url, "shop.example")
    assert set(internet.connected) <= {PUBLIC}


@pytest.mark.parametrize("port", [22, 8080])
def test_other_ports_are_refused(internet: Internet, port: int) -> None:
    assert "names a port that is not allowed" in refused(f"http://shop.example:{port}/", "shop.example")
    assert not internet.connected


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher"])
def test_redirects_to_other_schemes_are_refused(internet: Internet, scheme: str) -> None:
    assert "only http and https" in refused(f"http://shop.example/to/{scheme}://shop.example/x", "shop.example")


PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "169.254.169.254",  # where clouds keep their secrets
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_allowed_name_that_leads_home_is_refused(internet: Internet, address: str) -> None:
    for answer in ([address], [PUBLIC, address]):
        internet.names["shop.example"] = [answer]
        assert "leads into a private network" in refused("http://shop.example/", "shop.example")
        assert "leads into a private network" in refused("https://shop.example/", "shop.example")
    assert not internet.connected


@pytest.mark.parametrize("spelling", ["2130706433", "0177.0.0.1", "0x7f.1", "127.1", "[::ffff:7f00:1]"])
def test_an_address_is_seen_through_even_if_somebody_allowed_it(internet: Internet, spelling: str) -> None:
    assert "private network" in refused(f"http://{spelling}/", spelling.strip("[]"))
    assert not internet.connected


def test_a_name_that_changes_its_mind_gains_nothing(internet: Internet) -> None:
    internet.names["shop.example"] = [[PUBLIC], ["127.0.0.1"]]  # DNS rebinding: checked once, connected to the second
    assert download("http://shop.example/", max_bytes=1000, hosts={"shop.example"})[1] == b"picture of shop.example"
    assert internet.connected == [PUBLIC]
    assert "leads into a private network" in refused("http://shop.example/", "shop.example")
    internet.names["shop.example"] = [[PUBLIC], ["10.0.0.1"]]
    assert "leads into a private network" in refused("http://shop.example/to/http://shop.example/x", "shop.example")
    assert internet.connected == [PUBLIC, PUBLIC]


def test_public_addresses_are() -> None:
    assert is_public(PUBLIC) and is_public(OTHER) and is_public("2a00:1450:4001:81b::200e")
