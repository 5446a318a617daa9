"""Whatever is done to a store in whatever order, it is what a model in memory says it is."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kdcache.errors import IncompleteStoreError
from kdcache.remotes.folder import FolderPlace
from kdcache.share import pull, push
from kdcache.store import StoreWriter, check, open_store
from kdcache.store.progress import committed
from kdcache.verify import verify
from tests.store.faulty import FaultyDisk, Killed
from tests.store.test_writers import ROWS, make, opened, work


class StoreMachine(RuleBasedStateMachine):
    """Writers come, write, are killed in the middle of a call, seal; readers read, verify and copy."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.folder / "s"
        self.writers: list[tuple[StoreWriter, Iterator[int]]] = []
        self.known = set[int]()
        self.sealed = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule()
    @precondition(lambda self: len(self.writers) < 3)
    def come(self) -> None:
        writer = opened(self.store)
        assert (writer.digest is not None) == self.sealed
        self.writers.append((writer, writer.unmade()))

    @rule(which=st.integers(0, 2), shards=st.integers(1, 8))
    @precondition(lambda self: self.writers)
    def write(self, which: int, shards: int) -> None:
        writer, unmade = self.writers[which % len(self.writers)]
        for _ in range(shards):
            index = next(unmade, None)
            if index is None:
                return
            make(writer, index)
            self.known.add(index)

    @rule(which=st.integers(0, 2), at=st.integers(1, 80), after=st.booleans())
    @precondition(lambda self: self.writers)
    def be_killed(self, which: int, at: int, after: bool) -> None:
        writer, unmade = self.writers.pop(which % len(self.writers))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            FaultyDisk(patch, at, "killed after" if after else "killed before")
            for index in unmade:
                make(writer, index)
            writer.finish()
        self.known |= committed(self.store)  # what it had time for
        self.sealed = (self.store / "manifest.json").is_file()

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.writers)
    def seal(self, which: int) -> None:
        writer, _ = self.writers[which % len(self.writers)]
        if len(self.known) == len(ROWS):
            assert writer.finish() == DIGEST[0]
            self.sealed = True
        else:
            with pytest.raises(IncompleteStoreError):
                writer.finish()

    @rule()
    def read(self) -> None:
        if not self.sealed:
            if self.store.is_dir():
                with pytest.raises(IncompleteStoreError):
                    open_store(self.store)
            return
        store = open_store(self.store)
        assert store.digest == DIGEST[0]
        assert [len(one.labels) for one in store] == [count for counts in ROWS for count in counts]

    @rule()
    @precondition(lambda self: self.sealed)
    def verify_and_copy(self) -> None:
        assert verify(self.store).problems == ()
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.store, copy)
        assert check(open_store(copy)) == []

    @rule(puts=st.integers(0, 6))
    @precondition(lambda self: self.sealed)
    def push_is_killed_and_goes_on(self, puts: int) -> None:
        there, url = self.folder / "there", f"file://{self.folder}/there"
        put, done = FolderPlace.put, []

        def killed(place: FolderPlace, objects: Any, **rest: Any) -> None:
            if len(done) >= puts:
                raise Killed
            done.append(None)
            put(place, objects[:7], **rest)  # of a batch some may have come, whatever is said of it
            put(place, objects, **rest)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(FolderPlace, "put", killed)
            push(self.store, url)
        if not (there / "manifest.json").is_file() and there.is_dir():
            with pytest.raises(IncompleteStoreError):
                open_store(url)
        assert push(self.store, url).digest == DIGEST[0]
        assert check(open_store(url)) == []
        back = self.folder / "back"
        assert pull(f"{url}#blake3={DIGEST[0]}", back).digest == DIGEST[0]
        assert check(open_store(back)) == []

    @invariant()
    def what_is_committed_stays(self) -> None:
        assert committed(self.store) == self.known


DIGEST = [""]


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("machine") / "s"
    work(folder, 0)
    DIGEST[0] = open_store(folder).digest


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=16, deadline=None)
