"""Plug-ins are found by the name of their file, and named when there is no such one."""

import importlib
import sys
from pathlib import Path

import pytest

from kdcache import registry
from kdcache.errors import ConfigError


def test_files_of_a_family_are_its_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tmp_path / "made_up_family"
    family.mkdir()
    (family / "__init__.py").write_text("")
    (family / "one.py").write_text("plugin = 'the first'\n")
    (family / "two.py").write_text("raise RuntimeError('listing names must not import')\n")
    (family / "_private.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.names("made_up_family") == ["one", "two"]
    assert registry.find("made_up_family", "one") == "the first"
    with pytest.raises(ConfigError, match="named 'onee'") as error:
        registry.find("made_up_family", "onee")
    assert "'one'" in error.value.hint
    with pytest.raises(ConfigError) as error:
        registry.find("made_up_family", "zzzzzz")
    assert "one, two" in error.value.hint
    sys.modules.pop("made_up_family")


@pytest.mark.parametrize("name", ["../errors", "os", "", "__init__", "_private", "one.two"])
def test_a_name_reaches_nothing_but_plugins(name: str) -> None:
    with pytest.raises(ConfigError):
        registry.find("kdcache.codecs", name)


def test_every_family_has_what_the_documents_say() -> None:
    assert {"transformers", "callable"} <= set(registry.names("kdcache.teachers"))
    assert {"text", "jsonl", "parquet", "huggingface"} == set(registry.names("kdcache.sources"))


def test_what_a_user_names_is_found_in_the_working_folder_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_my_own.py").write_text("THING = 3\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "of_my_own", raising=False)
    if "" not in sys.path:
        with pytest.raises(ImportError):
            importlib.import_module("of_my_own")
    assert registry.attribute("of_my_own:THING") == 3
    assert sys.path == before
    with pytest.raises(AttributeError):
        registry.attribute("of_my_own:OTHER")
    with pytest.raises(ImportError):
        registry.attribute("of_nobodys:THING")
    assert sys.path == before
