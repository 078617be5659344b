"""The bytes behind an http(s) URL, fetched as if the host were hostile.

What it does: GET, at most three redirects, an upper bound on bytes and on seconds. Nothing is decompressed on the way.

What it does not know: pictures. `images.load_image` decides what the bytes are, and whether URLs are allowed at all.

What always holds: schemes other than http and https are refused, in a redirect too; an error names the host only,
since a URL's path and query may hold a token. Where hosts are named, for a caller who may not reach what this machine
reaches, each address on the way, that of a redirect too, must be of one of them, at the usual port, and lead to the
public internet. What was checked is what is connected to: a name is not resolved twice, and no proxy resolves it again.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Collection
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from multimodal.images import ImageError, printable

# For the whole download, and for each wait on the socket: a person is waiting for the answer.
SECONDS = 15.0
# A short link, http to https, and one more.
REDIRECTS = 3
_CHUNK = 64 * 1024
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # NAT64 and the like, which lead to any IPv4 address, are outside


def download(
    url: str,
    *,
    max_bytes: int,
    hosts: Collection[str] | None = None,
    seconds: float = SECONDS,
    redirects: int = REDIRECTS,
) -> tuple[str, bytes]:
    """Fetches a URL.

    Args:
        url: starts with http:// or https://.
        max_bytes: most bytes that the host may send; one more and the download ends.
        hosts: names of the only hosts that may be asked, over the public internet; `None` for any that this machine
            reaches, its own network included.
        seconds: how long it may take.
        redirects: how many redirects are followed.

    Returns:
        The name for messages ("URL at example.org") and the bytes.

    Raises:
        ImageError: the scheme or the host is refused, the host can't be reached, answers with an error, or passes a
            limit.
    """
    deadline = time.monotonic() + seconds
    opener = OpenerDirector()  # bare: build_opener() would add file:, ftp: and data:, and follow redirects by itself
    for handler in (
        (ProxyHandler(), HTTPHandler(), HTTPSHandler()) if hosts is None else (_PublicHTTP(), _PublicHTTPS())
    ):
        opener.add_handler(handler)
    name = "URL"
    try:
        for _ in range(redirects + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https"):
                problem = f"leads to the scheme '{printable(parts.scheme, 20)}'; only http and https are fetched"
                raise ImageError(name, problem, "Download the picture first")
            if "@" in parts.netloc:
                raise ImageError(name, "holds a user name or password", "Download the picture first")
            name = f"URL at {printable(parts.hostname or '?')}"
            if hosts is not None:
                _check_host(name, parts, hosts)
            request = Request(url, headers={"User-Agent": "multimodal", "Accept": "image/*, application/dicom"})
            with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
                if response.status == 200:
                    return name, _body(response, name, max_bytes, deadline)
                target = response.headers.get("Location")
                if not (300 <= response.status < 400 and target):
                    raise ImageError(name, f"answers with status {response.status}", "Check the address")
                url = urljoin(url, target)
    except ImageError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ImageError(name, f"can't be fetched ({type(reason).__name__})", "Check the address") from error
    raise ImageError(name, f"redirects more than {redirects} times", "Pass the address it ends at")


def _check_host(name: str, parts: SplitResult, hosts: Collection[str]) -> None:
    if (parts.hostname or "").rstrip(".") not in hosts:
        raise ImageError(name, "is of a host that is not allowed", "Send the picture itself, as a data-URI")
    if parts.port not in (None, 80, 443):
        raise ImageError(name, "names a port that is not allowed", "Send the picture itself, as a data-URI")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and of nothing that leads elsewhere."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    return ip in _GLOBAL_IPV6 and ip.is_global and ip.sixtofour is None and ip.teredo is None


def _connect(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """As `socket.create_connection`, to the public internet only.

    A name that leads to public and to other addresses is refused: whoever answers so wants to be asked again.
    """
    host, port = address
    found = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    if not all(map(is_public, found)):
        name = f"URL at {printable(host)}"
        raise ImageError(name, "leads into a private network", "Send the picture itself, as a data-URI")
    errors: list[OSError] = []
    for ip in found:
        try:
            return socket.create_connection((ip, port), timeout, source_address)
        except OSError as error:
            errors.append(error)
    raise errors[0] if errors else OSError("the name leads nowhere")


class _PublicConnection(HTTPConnection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._create_connection = _connect


class _PublicSecureConnection(HTTPSConnection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._create_connection = _connect  # the certificate is still that of the name


class _PublicHTTP(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicConnection, request)


class _PublicHTTPS(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicSecureConnection, request)


def _body(response: Any, name: str, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise ImageError(name, f"sends over {max_bytes:,} bytes, the most that is read", "Pass max_bytes=")
        if time.monotonic() > deadline:
            raise ImageError(name, "takes too long to send its picture", "Download the picture first")
    return bytes(body)
