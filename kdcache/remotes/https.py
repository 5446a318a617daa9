"""`https://`: any web server with the store's files below a URL. Read only.

Plain requests of the standard library: an object is asked for whole, so no range can be ignored or mixed up.
"""

import http.client
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from kdcache.errors import AccessError, UnsafeError
from kdcache.remotes import AGAIN, TransientError

BLOCK = 1 << 20


class WebPlace:
    """A URL that object names are appended to.

    Args:
        url: Of the folder.
        headers: Sent to its host, and to no other.
    """

    batch = (1, 1)

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        self.url = url
        self._headers = headers or {}

    def get(self, name: str, limit: int, stall: float) -> bytes:
        """Return an object; see `kdcache.remotes.Remote.get`."""
        return self.read(f"{self.url}/{quote(name)}", limit, stall)

    def read(self, url: str, limit: int, stall: float) -> bytes:
        """Return what a URL holds, up to a limit of bytes."""
        # an encoding that nobody asked for would have other bytes than the manifest says
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "kdcache"})
        for key, value in self._headers.items():
            request.add_unredirected_header(key, value)
        try:
            with urllib.request.build_opener(_Redirects(url)).open(request, timeout=stall) as answer:
                blocks, count = [], 0
                while block := answer.read(min(BLOCK, limit + 1 - count)):
                    blocks.append(block)
                    count += len(block)
                    if count > limit:
                        break
                declared = answer.headers.get("Content-Length")
                if declared and declared.isdecimal() and count < min(int(declared), limit + 1):
                    raise TransientError(f"{count:,} bytes came of {int(declared):,}")
                return b"".join(blocks)
        except urllib.error.HTTPError as error:
            error.close()
            raise _refusal(error, url) from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise TransientError(f"{type(reason).__name__}: {reason}") from error

    def sizes(self) -> dict[str, int]:
        """A web server lists nothing."""
        return {}

    def put(self, objects: Sequence[tuple[str, bytes]], *, last: bool = False) -> None:
        """A web server takes nothing."""
        raise AccessError(
            "Nothing can be written to a web server.", where=self.url, hint="Push to hf://, s3://, gs:// or az://."
        )


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code in AGAIN:
        return TransientError(f"the server said {error.code} {error.reason}", _asked_for(error.headers))
    if error.code in (404, 410):
        return FileNotFoundError(url)
    if 300 <= error.code < 400:
        return _refused_redirect(str(error.headers.get("Location")), url)
    hint = {
        401: "It needs a token: log in, or set the token for this place.",
        403: "This token or network may not read it; a gated data set asks for its terms to be accepted.",
    }.get(error.code, "Check the URL.")
    return AccessError(f"The server refused: {error.code} {error.reason}.", where=url, hint=hint)


def _refused_redirect(target: str, url: str) -> UnsafeError:
    return UnsafeError(
        f"The server sends to {target[:200]!r}, which is not followed: to the web only, never out of https, and not "
        "from a public host into a private network.",
        where=url,
        hint="Ask whoever shares the store for its real URL.",
    )


def _asked_for(headers: Any) -> float:
    """Return the seconds that a server asked to be left alone for, by Retry-After as a number or a date."""
    said = str(headers.get("Retry-After") or "").strip()
    if said.isdecimal():
        return float(said)
    try:
        date = parsedate_to_datetime(said)
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to the web only, not from a public host into a private network, and not from https to http."""

    def __init__(self, url: str) -> None:
        self._origin = urlsplit(url)

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urlsplit(urljoin(req.full_url, newurl))
        if target.scheme not in ("http", "https") or (self._origin.scheme == "https" and target.scheme == "http"):
            fp.close()
            raise UnsafeError(f"The server redirects to {target.scheme!r}.", where=self._origin.geturl())
        if (
            target.hostname != self._origin.hostname
            and _private(target.hostname)
            and not _private(self._origin.hostname)
        ):
            fp.close()
            raise UnsafeError("The server redirects into a private network.", where=self._origin.geturl())
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _private(host: str | None) -> bool:
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "", None)}
    except OSError:
        return False  # whoever connects to it will say so
    return any(not ipaddress.ip_address(str(one).split("%")[0]).is_global for one in found)


plugin = WebPlace
