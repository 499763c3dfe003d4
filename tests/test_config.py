"""Settings: precedence of sources, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmd.config import Settings
from glmd.config_sources import load
from glmd.engine.config import EngineConfig
from glmd.errors import SettingsError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GLMD_CONFIG", raising=False)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GLMD_{name.upper()}", raising=False)


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "glmd.toml"
    path.write_text(text)
    return path


def test_every_setting_has_a_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_precedence_is_flag_environment_file_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, 'host = "file"\nport = 1\nmax_context = 3\n')
    monkeypatch.setenv("GLMD_PORT", "2")
    monkeypatch.setenv("GLMD_HOST", "environment")
    settings = load({"host": "flag", "port": None}, file)
    assert (settings.host, settings.port, settings.max_context) == ("flag", 2, 3)
    assert settings.temperature is None


def test_glmd_config_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMD_CONFIG", str(config(tmp_path, "port = 9")))
    assert load({}).port == 9


def test_the_file_in_the_user_config_folder_is_read(tmp_path: Path) -> None:
    path = tmp_path / "xdg" / "glmd" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("port = 10")
    assert load({}).port == 10


def test_lists_are_arrays_in_the_file_and_commas_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, 'aliases = ["a", "b"]')
    assert load({}, file).aliases == ("a", "b")
    monkeypatch.setenv("GLMD_ALIASES", "c, d")
    assert load({}, file).aliases == ("c", "d")


def test_sizes_accept_units() -> None:
    settings = load({"max_body": "2MiB", "memory_budget": "20 GB"})
    assert settings.engine_config["memory_budget"] == 20_000_000_000


def test_defaults_of_the_engine_are_stated_once() -> None:
    assert EngineConfig(**load({}).engine_config) == EngineConfig()  # type: ignore[arg-type]


def test_repr_hides_the_api_key() -> None:
    assert "hunter2" not in repr(load({"api_key": "hunter2"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "Unknown setting prot; did you mean port?"),
        ("max-context = 1", "Unknown setting max-context; did you mean max_context?"),
        ("zzzzzz = 1", "Unknown setting zzzzzz."),
        ("port = 70000", "port: Input should be less than or equal to 65535."),
        ("port =", "Invalid value"),
        ("temperature = nan", "temperature: Input should be"),
    ],
)
def test_an_error_in_the_file_is_one_line_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = config(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load({}, file)
    assert str(file) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        load({}, tmp_path / "nowhere.toml")


def test_errors_name_the_flag_or_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SettingsError, match=r"^--max-context: .* greater than or equal to 1\.$"):
        load({"max_context": 0})
    monkeypatch.setenv("GLMD_PORT", "http")
    with pytest.raises(SettingsError, match=r"^GLMD_PORT: .* valid integer"):
        load({})
    monkeypatch.delenv("GLMD_PORT")
    monkeypatch.setenv("GLMD_MAX_CONTXT", "1")
    with pytest.raises(SettingsError, match="did you mean GLMD_MAX_CONTEXT"):
        load({})


def test_an_error_does_not_repeat_the_api_key() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"api_key": ""})
    assert "--api-key" in caught.value.message


@pytest.mark.parametrize(("value", "expected"), [("off", 0), ("auto", "auto"), ("1", 1), ("3", 3)])
def test_mtp_is_converted_for_the_engine(value: str, expected: int | str) -> None:
    assert load({"mtp": value}).engine_config["mtp"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[profiles.a]\ntemprature = 1",
            "profiles.a: Unknown profile setting temprature; did you mean temperature?",
        ),
        ("[profiles.a]\ntop_p = 2", "profiles.a.top_p: Input should be less than or equal to 1."),
        ("[profiles.'a b']\ntop_p = 1", "profiles.a b: String should match pattern"),
        ("profiles = 1", "profiles: Input should be a valid dictionary."),
        ("profile = 'tols'", "profile: Unknown profile tols; did you mean tools?"),
    ],
)
def test_an_error_in_a_profile_names_file_table_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = config(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load({}, file)
    assert caught.value.message.startswith(f"{file}: {message}")
    assert "\n" not in caught.value.message


def test_profiles_in_the_environment_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMD_PROFILES", '{"a": {"top_k": 3}}')
    assert load({}).profiles["a"].top_k == 3
    monkeypatch.setenv("GLMD_PROFILES", "a")
    with pytest.raises(SettingsError, match=r"^GLMD_PROFILES: .* JSON"):
        load({})


def test_effort_budgets_are_a_table_or_pairs_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {"minimal": 512, "medium": 8192}
    file = config(tmp_path, "[effort_budgets]\nlow = 7\nhigh = 8\n")
    assert load({}, file).effort_budgets == rest | {"low": 7, "high": 8}
    monkeypatch.setenv("GLMD_EFFORT_BUDGETS", "low=9, high=10,max=11")
    assert load({}, file).effort_budgets == rest | {"low": 9, "high": 10, "max": 11}
    monkeypatch.setenv("GLMD_EFFORT_BUDGETS", "low")
    with pytest.raises(SettingsError, match="GLMD_EFFORT_BUDGETS"):
        load({}, file)
