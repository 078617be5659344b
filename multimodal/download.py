"""The bytes behind an http(s) URL, fetched as if the host were hostile.

What it does: GET, at most three redirects, an upper bound on bytes and on seconds. Nothing is decompressed on the way.

What it does not know: pictures. `images.load_image` decides what the bytes are, and whether URLs are allowed at all.

What always holds: schemes other than http and https are refused, in a redirect too; an error names the host only,
since a URL's path and query may hold a token.
"""

from __future__ import annotations

import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from multimodal.images import ImageError, printable

# For the whole download, and for each wait on the socket: a person is waiting for the answer.
SECONDS = 15.0
# A short link, http to https, and one more.
REDIRECTS = 3
_CHUNK = 64 * 1024


def download(url: str, *, max_bytes: int, seconds: float = SECONDS, redirects: int = REDIRECTS) -> tuple[str, bytes]:
    """Fetches a URL.

    Args:
        url: starts with http:// or https://.
        max_bytes: most bytes that the host may send; one more and the download ends.
        seconds: how long it may take.
        redirects: how many redirects are followed.

    Returns:
        The name for messages ("URL at example.org") and the bytes.

    Raises:
        ImageError: the scheme is refused, the host can't be reached, answers with an error, or passes a limit.
    """
    deadline = time.monotonic() + seconds
    opener = OpenerDirector()  # bare: build_opener() would add file:, ftp: and data:, and follow redirects by itself
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
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


def _body(response: Any, name: str, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise ImageError(name, f"sends over {max_bytes:,} bytes, the most that is read", "Pass max_bytes=")
        if time.monotonic() > deadline:
            raise ImageError(name, "takes too long to send its picture", "Download the picture first")
    return bytes(body)
