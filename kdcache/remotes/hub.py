"""`hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`: a data set repository of the Hugging Face hub.

Reading asks the hub for files by their public URL, with the token that huggingface_hub knows; writing makes commits. A
store takes several; its manifest is in the last, which is refused if somebody else has committed since the one before.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kdcache.errors import AccessError, ConfigError
from kdcache.remotes import AGAIN, TransientError
from kdcache.remotes.https import WebPlace

URL = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.%-]+))?(/(?P<folder>.+))?")


class HubPlace:
    """A folder of a data set repository.

    Args:
        url: As above.
    """

    batch = (200, 1 << 30)  # a larger commit may time out

    def __init__(self, url: str) -> None:
        found = URL.fullmatch(url)
        if found is None:
            raise ConfigError(
                "This is not a data set of the hub.",
                where=url,
                hint="Write it as hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME@REVISION/FOLDER.",
            )
        self.url = url
        self._repo, self._revision = found["repo"], found["revision"] or "main"
        self._folder = f"{found['folder']}/" if found["folder"] else ""
        self._head: str | None = None
        self._made = False

    def get(self, name: str, limit: int, stall: float) -> bytes:
        """Return an object; see `kdcache.remotes.Remote.get`."""
        hub = _hub(self.url)
        token = hub.get_token()
        address = hub.hf_hub_url(
            self._repo, self._folder + name, repo_type="dataset", revision=self._revision, endpoint=_endpoint()
        )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return WebPlace(self.url, headers).read(address, limit, stall)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below the folder."""
        folder = self._folder.rstrip("/") or None
        try:
            with _errors(self.url):
                tree = self._api().list_repo_tree(
                    self._repo, folder, recursive=True, repo_type="dataset", revision=self._revision
                )
                entries = list(tree)
        except FileNotFoundError:
            return {}  # it is made by the first upload
        return {one.path.removeprefix(self._folder): one.size for one in entries if hasattr(one, "size")}

    def put(self, objects: Sequence[tuple[str, bytes]], *, last: bool = False) -> None:
        """Make a commit of files."""
        hub, api = _hub(self.url), self._api()
        with _errors(self.url):
            if not self._made:
                api.create_repo(self._repo, repo_type="dataset", exist_ok=True)
                self._made = True
            made = api.create_commit(
                self._repo,
                [hub.CommitOperationAdd(self._folder + name, data) for name, data in objects],
                commit_message=f"Add {objects[0][0]}" + (f" and {len(objects) - 1} more" if len(objects) > 1 else ""),
                repo_type="dataset",
                revision=self._revision,
                parent_commit=self._head if last else None,
            )
        self._head = made.oid

    def _api(self) -> Any:
        return _hub(self.url).HfApi(endpoint=_endpoint())


def _hub(url: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "The hub needs the package huggingface_hub.", where=url, hint="Run: pip install 'kdcache[remote]'"
        ) from error
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _errors(url: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(url) from error
    except errors.HfHubHTTPError as error:
        said = str(error).strip().splitlines()[0][:300]
        status = getattr(error.response, "status_code", 0)
        if status in AGAIN:
            raise TransientError(said) from error
        hint = "Log in with `hf auth login`, with a token that may write." if status in (401, 403) else ""
        if status in (409, 412):
            hint = "Somebody else has committed meanwhile; run the same command again."
        raise AccessError(f"The hub refused: {said}.", where=url, hint=hint) from error
    except errors.OfflineModeIsEnabled as error:
        raise AccessError("The hub is switched off here.", where=url, hint="Unset HF_HUB_OFFLINE.") from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error


plugin = HubPlace
