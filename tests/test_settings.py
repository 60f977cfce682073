"""The table of environment variables: kinds, bad values, unknown names, and ENVS.md."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsa_backend_plugin import settings

ROOT = Path(__file__).resolve().parents[1]
BOOLS = [s.name for s in settings.SETTINGS.values() if s.kind == "bool"]
CHOICES = [s.name for s in settings.SETTINGS.values() if s.kind == "choice"]
NAMES = [s.name for s in settings.SETTINGS.values() if s.kind == "names"]
PATHS = [s.name for s in settings.SETTINGS.values() if s.kind == "path"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("NSA_PLUGIN_"):
            monkeypatch.delenv(name)


def test_every_setting_has_a_known_kind_and_a_valid_default():
    assert set(BOOLS) | set(CHOICES) | set(NAMES) | set(PATHS) == set(settings.SETTINGS)
    for name, setting in settings.SETTINGS.items():
        assert name.startswith("NSA_PLUGIN_")
        settings.get(name)
        assert setting.meaning.endswith(".")


def test_every_operation_has_a_variable_and_a_folder():
    assert [settings.impl_variable(op) for op in settings.OPERATIONS] == [n for n in NAMES if n.endswith("_IMPL")]
    folders = {p.parent.name for p in (ROOT / "src/nsa_backend_plugin/ops").glob("*/reference.py")}
    assert folders == set(settings.OPERATIONS)


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize(
    "raw, value", [("1", True), ("true", True), ("Yes", True), (" ON ", True), ("0", False), ("False", False)]
)
def test_bool(monkeypatch, name, raw, value):
    monkeypatch.setenv(name, raw)
    assert settings.get(name) is value
    assert settings.enabled(name) is value


WORDS = [("1", "1"), ("true", "1"), ("Yes", "1"), (" ON ", "1"), ("0", "0"), ("False", "0"), ("no", "0"), ("OFF", "0")]


@pytest.mark.parametrize("name", [name for name in CHOICES if "1" in settings.SETTINGS[name].choices])
@pytest.mark.parametrize("raw, value", WORDS)
def test_on_and_off_are_the_same_words_in_every_setting(monkeypatch, name, raw, value):
    monkeypatch.setenv(name, raw)
    assert settings.get(name) == value


@pytest.mark.parametrize("name", list(settings.SETTINGS))
@pytest.mark.parametrize("raw", ["", "  "])
def test_an_empty_variable_is_an_unset_one(monkeypatch, name, raw):
    unset = settings.get(name)
    monkeypatch.setenv(name, raw)
    assert settings.get(name) == unset
    settings.validate()


@pytest.mark.parametrize("name", CHOICES)
def test_choice(monkeypatch, name):
    for choice in settings.SETTINGS[name].choices:
        monkeypatch.setenv(name, f" {choice} ")
        assert settings.get(name) == choice


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("raw, value", [("", ()), ("triton", ("triton",)), (" aiter, triton,,", ("aiter", "triton"))])
def test_names(monkeypatch, name, raw, value):
    monkeypatch.setenv(name, raw)
    assert settings.get(name) == value


@pytest.mark.parametrize("name", PATHS)
def test_path(monkeypatch, name):
    assert settings.get(name) == settings.SETTINGS[name].default
    monkeypatch.setenv(name, " a folder/of mine ")
    assert settings.get(name) == "a folder/of mine"


@pytest.mark.parametrize("name", BOOLS + CHOICES)
def test_bad_value_names_variable_value_and_valid_ones(monkeypatch, name):
    monkeypatch.setenv(name, "maybe")
    valid = settings.SETTINGS[name].choices or ("1", "0")
    with pytest.raises(ValueError, match=f"{name}='maybe': expected one of ") as caught:
        settings.get(name)
    assert all(v in str(caught.value) for v in valid)
    with pytest.raises(ValueError, match=name):
        settings.validate()


def test_unknown_name_is_refused(monkeypatch):
    settings.validate()
    monkeypatch.setenv("NSA_PLUGIN_DISABEL", "1")
    with pytest.raises(ValueError, match="NSA_PLUGIN_DISABEL='1'") as caught:
        settings.validate()
    assert "NSA_PLUGIN_DISABLE" in str(caught.value)
    with pytest.raises(KeyError):
        settings.get("NSA_PLUGIN_DISABEL")


def test_values_are_read_at_every_access(monkeypatch):
    assert settings.enabled("NSA_PLUGIN_DISABLE") is False
    monkeypatch.setenv("NSA_PLUGIN_DISABLE", "1")
    assert settings.enabled("NSA_PLUGIN_DISABLE") is True


def test_envs_md_is_what_the_command_prints():
    assert (ROOT / "ENVS.md").read_text() == settings.markdown(), "run: nsa-plugin envs > ENVS.md"
    for name in settings.SETTINGS:
        assert f"| `{name}` |" in settings.markdown()
