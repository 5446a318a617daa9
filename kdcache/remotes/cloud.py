"""`s3://`, `gs://`, `az://`: object stores, through obstore; settings and credentials from the environment.

AWS_ENDPOINT_URL, AWS_REGION and the like for S3, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and so on:
those of obstore. AWS_SKIP_SIGNATURE=true reads public buckets. GOOGLE_ALLOW_HTTP=true is for emulators.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from kdcache.errors import AccessError, ConfigError
from kdcache.remotes import AGAIN, TransientError

AT_ONCE = 8
"""Objects written side by side."""


class CloudPlace:
    """A prefix of a bucket.

    Args:
        url: Of the prefix.
    """

    batch = (64, 256 << 20)

    def __init__(self, url: str) -> None:
        self.url = url
        self._held: tuple[int, float, Any] | None = None

    def get(self, name: str, limit: int, stall: float) -> bytes:
        """Return an object; see `kdcache.remotes.Remote.get`."""
        import obstore

        with _errors(self.url):
            answer = obstore.get(self._store(stall), name)
            if answer.meta["size"] > limit:
                return bytes(limit + 1)  # too large, whatever it is
            return bytes(answer.bytes())

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object below the prefix."""
        import obstore

        with _errors(self.url):
            return {one["path"]: one["size"] for batch in obstore.list(self._store(30.0)) for one in batch}

    def put(self, objects: Sequence[tuple[str, bytes]], *, last: bool = False) -> None:
        """Write objects, several at once."""
        import obstore

        place = self._store(30.0)

        def one(item: tuple[str, bytes]) -> None:
            with _errors(self.url):
                obstore.put(place, item[0], item[1])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(one, objects):
                pass

    def _store(self, stall: float) -> Any:
        # a forked process has none of the threads of the client that it inherits: it makes its own
        if self._held is None or self._held[:2] != (os.getpid(), stall):
            try:
                from obstore.store import from_url
            except ImportError as error:
                raise ConfigError(
                    "Object stores need the package obstore.", where=self.url, hint="Run: pip install 'kdcache[remote]'"
                ) from error
            connect: Any = from_url  # its overloads are by kind of store, which only the URL says here
            plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://")
            plain = plain or os.environ.get("GOOGLE_ALLOW_HTTP") == "true"
            options: dict[str, Any] = {
                "timeout": timedelta(seconds=10 * stall),
                "read_timeout": timedelta(seconds=stall),
            }
            made = connect(
                self.url,
                client_options={**options, **({"allow_http": True} if plain else {})},
                retry_config={"max_retries": 0},  # kdcache.remotes.fetch has the patience
            )
            self._held = (os.getpid(), stall, made)
        return self._held[2]


@contextmanager
def _errors(url: str) -> Iterator[None]:
    from obstore import exceptions

    try:
        yield
    except (FileNotFoundError, exceptions.NotFoundError) as error:
        raise FileNotFoundError(url) from error
    except (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise AccessError(
            f"The bucket may not be used: {_first_line(error)}.",
            where=url,
            hint="Check credentials, region and endpoint in the environment.",
        ) from error
    except exceptions.BaseError as error:
        status = re.search(r"status: (\d{3})", str(error))
        if status and status[1].startswith("4") and int(status[1]) not in AGAIN:
            raise AccessError(
                f"The bucket refused: {_first_line(error)}.",
                where=url,
                hint="Check that the bucket exists, and region and endpoint in the environment.",
            ) from error
        raise TransientError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]


plugin = CloudPlace
