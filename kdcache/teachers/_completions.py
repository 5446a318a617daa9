"""Ask an OpenAI-compatible server, with patience: plain requests of the standard library, no redirect followed.

The key goes into one header and nowhere else; whatever a server says is freed of it before it stands in an error.
"""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from kdcache.errors import AccessError, ConfigError, OutageError, TeacherError
from kdcache.remotes import AGAIN, Patience, TransientError

T = TypeVar("T")

PATIENCE = Patience(stall=300.0)
"""A server may let a request wait for others before its first byte comes."""

SHORT = 3
"""Tries of a first contact, and of a request that the server may simply not know."""

LIMIT = 1 << 28
"""Bytes of an answer."""


class NotAnswered(Exception):
    """The server understood the request and will not answer it as it is asked.

    Attributes:
        said: What the server gave as the reason.
    """

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


class Completions:
    """One model of one server.

    Args:
        url: Up to `/v1`; may hold a user and a query, which are sent and never shown.
        key: Sent as a bearer token; empty for none.
        patience: How long the server is waited for.

    Attributes:
        url: Without user and query.

    Raises:
        ConfigError: It is no URL of the web.
    """

    def __init__(self, url: str, key: str, patience: Patience) -> None:
        try:
            parts, port = urlsplit(url), urlsplit(url).port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "The server's URL is not one of the web.",
                where="teacher.model",
                hint="Write it as http://host:port/v1.",
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("The server's key has characters that no key has.", where="teacher.key_env")
        host = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
        self.url = urlunsplit(
            (parts.scheme, host if port is None else f"{host}:{port}", parts.path.rstrip("/"), "", "")
        )
        self._query = f"?{parts.query}" if parts.query else ""
        self._patience = patience
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        basic = base64.b64encode(f"{user}:{password}".encode()).decode() if user or password else ""
        self._secrets = [one for one in (key, basic, password, parts.query) if one]
        said = f"Bearer {key}" if key else f"Basic {basic}" if basic else ""
        self._headers = {"Authorization": said} if said else {}

    def models(self) -> list[dict[str, Any]]:
        """Return what the server lists as its models; nothing where it has no such list.

        Raises:
            AccessError, OutageError: It may not be asked, or does not answer.
        """
        try:
            answer = self._patiently(lambda: self._once("/models", None), SHORT)
        except NotAnswered:
            return []
        listed = answer.get("data")
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    def complete(self, request: Mapping[str, Any], *, trial: bool = False) -> dict[str, Any]:
        """Return the answer to a completion request.

        Args:
            request: As `/completions` takes it.
            trial: It is not known yet whether the server knows such requests: an inner error is soon taken as a no.

        Raises:
            NotAnswered: It does not answer such a request.
            AccessError, OutageError: It may not be asked, or does not answer.
        """
        return self._patiently(
            lambda: self._once("/completions", request), SHORT if trial else self._patience.tries, trial
        )

    def _once(self, path: str, request: Mapping[str, Any] | None) -> dict[str, Any]:
        """Ask once.

        Raises:
            NotAnswered: Not in this way.
            AccessError: Not at all.
            TransientError: Another try may do better.
        """
        data = None if request is None else json.dumps(request).encode()
        asked = urllib.request.Request(
            self.url + path + self._query,
            data=data,
            headers={"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "kdcache"},
        )
        for name, value in self._headers.items():
            asked.add_unredirected_header(name, value)
        try:
            with urllib.request.build_opener(_NoRedirect()).open(asked, timeout=self._patience.stall) as answer:
                body = answer.read(LIMIT + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, path) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise TransientError(f"{type(reason).__name__}: {self.clean(str(reason))}") from None
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if len(body) > LIMIT or not isinstance(found, dict):
            raise TransientError(f"its answer of {len(body):,} bytes is no JSON object")
        return found

    def _refusal(self, error: urllib.error.HTTPError, path: str) -> Exception:
        said = self.clean(_message(error))
        if error.code in (401, 403):
            return AccessError(
                f"The server refused: {error.code} {said}",
                where=self.url,
                hint="Put its key into the environment variable that teacher.key_env names.",
            )
        if 300 <= error.code < 400:
            return AccessError(
                f"The server sends elsewhere ({error.code}), which is not followed.",
                where=self.url,
                hint="Give the URL that it sends to as teacher.model.",
            )
        if error.code in AGAIN:
            return TransientError(f"it said {error.code} {said}", _asked_for(error.headers.get("Retry-After")))
        return NotAnswered(f"{error.code} {said}" + (f" (at {path})" if error.code == 404 else ""))

    def _patiently(self, act: Callable[[], T], tries: int, trial: bool = False) -> T:
        waited = 0.0
        for number in range(tries):
            try:
                return act()
            except TransientError as error:
                what, wait = error.what, max(error.wait, self._patience.backoff(number))
            if trial and what.startswith("it said 500") and number == 1:
                raise NotAnswered(what.removeprefix("it said "))
            waited += wait
            if waited > self._patience.outage or number + 1 == tries:
                break
            time.sleep(wait)
        raise OutageError(
            f"The server did not answer as it should, in {number + 1} tries: {what}.",
            where=self.url,
            hint="See whether it runs, and run the same command again: finished shards are kept.",
        )

    def clean(self, text: str) -> str:
        """Return a text of the server's without the key, which some repeat, and not too long."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:300]


def unusable(
    url: str, what: str, hint: str = "It must serve /v1/completions with echo and logprobs, as vLLM does."
) -> TeacherError:
    """Return the error for what a server says and should not."""
    return TeacherError(f"The server's answer cannot be used: {what}.", where=url, hint=hint)


def _message(error: urllib.error.HTTPError) -> str:
    """Return what a server gives as its reason, in one line."""
    try:
        said: Any = json.loads(error.read(1 << 16))
    except (ValueError, OSError, RecursionError, http.client.HTTPException):
        return str(error.reason)
    for name in ("error", "message", "detail"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return " ".join(str(said).split()) or str(error.reason)


def _asked_for(said: str | None) -> float:
    """Return the seconds that a server asked to be left alone for, as a number or a date."""
    try:
        return max(0.0, float(said or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A request that was sent on elsewhere would take its texts there, and come as another one."""

    def redirect_request(self, *_: Any) -> None:
        return None
