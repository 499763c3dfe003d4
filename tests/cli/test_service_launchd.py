"""`glmd service` with launchd: the property list, and the calls of launchctl."""

from __future__ import annotations

import json
import os
import plistlib
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import httpx
import psutil
import pytest
from launchd_keys import check_documented
from service_kit import STAND_INS, Mac, executable, path_with
from typer.testing import CliRunner

from glmd.cli import daemon
from glmd.cli import service as commands
from glmd.cli.daemon import wait_until_ready
from glmd.cli.daemon.launchd import ADVICE, LOG_BYTES, Launchd, agent_plist, parse_fields
from glmd.cli.daemon.spec import ServiceSpec, build_spec, inherited
from glmd.errors import ServiceError


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    mac = Mac(home=tmp_path / "home", state=tmp_path / "launchd")
    mac.home.mkdir()
    mac.state.mkdir()
    executable(tmp_path / "bin" / "launchctl", STAND_INS / "launchctl.py")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(mac.home))
    monkeypatch.setenv("LAUNCHD_STATE", str(mac.state))
    for name in list(os.environ):
        if name.startswith(("GLMD_", "HF_", "XDG_")):
            monkeypatch.delenv(name)
    yield mac
    Launchd().stop()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return executable(tmp_path / "venv" / "bin" / "glmd", STAND_INS / "server.py")


@pytest.fixture
def spec(program: Path) -> ServiceSpec:
    return ServiceSpec((str(program), "serve", "a model"), {"GLMD_API_KEY": "k&<y>"}, 40)


@pytest.fixture
def run(mac: Mac, program: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Run `glmd service …` as `…/venv/bin/glmd` on a Mac."""
    monkeypatch.setattr("sys.argv", [str(program), "service"])
    monkeypatch.setattr("sys.platform", "darwin")
    # By its module's name: `glmd.cli.serve` is the command of that name.
    monkeypatch.setattr(import_module("glmd.cli.serve"), "find_model", lambda settings: None)
    return CliRunner()


def test_property_list_survives_a_round_trip(spec: ServiceSpec) -> None:
    plist = agent_plist(spec, Path("/Users/someone/Library/Logs/glmd/glmd.log"))
    assert plistlib.loads(plistlib.dumps(plist)) == plist


def test_property_list_has_only_documented_keys_of_the_documented_types(
    spec: ServiceSpec,
) -> None:
    check_documented(agent_plist(spec, Path("/log")))


def test_launchd_restarts_after_failures_only_and_not_in_a_tight_loop(spec: ServiceSpec) -> None:
    plist = agent_plist(spec, Path("/log"))
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
    assert plist["RunAtLoad"]
    assert plist["ThrottleInterval"] >= 10
    assert plist["ProcessType"] == "Interactive"
    assert plist["SoftResourceLimits"]["NumberOfFiles"] > 4096
    assert plist["ExitTimeOut"] > 32  # drain timeout, and two seconds for the last errors


def test_program_is_an_absolute_path_that_survives_upgrades(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "local" / "bin" / "glmd"
    link.parent.mkdir(parents=True)
    link.symlink_to(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["local/bin/glmd", "service", "install"])
    made = build_spec(None, drain_timeout=30)
    assert made.arguments == (str(link), "serve", "--service")


def test_without_a_script_the_interpreter_runs_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/glmd/__main__.py", "service", "install"])
    interpreter, *rest = build_spec("a/b", host="::", port=1, drain_timeout=30).arguments
    assert os.path.isabs(interpreter)
    assert rest == ["-m", "glmd", "serve", "--service", "a/b", "--host", "::", "--port", "1"]


def test_a_program_in_the_uv_cache_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", "/home/x/.cache/uv/archive-v0/abc")
    with pytest.raises(ServiceError, match="uv tool install"):
        build_spec(None, drain_timeout=30)


def test_paths_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "flash").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = build_spec("models/flash", config=Path("glmd.toml"), drain_timeout=30)
    assert str(tmp_path / "models" / "flash") in made.arguments
    assert made.arguments[-1] == str(tmp_path / "glmd.toml")
    assert inherited({"GLMD_CONFIG": "c.toml"}) == {"GLMD_CONFIG": str(tmp_path / "c.toml")}


def test_only_settings_are_inherited_and_no_hub_token() -> None:
    shell = {
        "GLMD_PORT": "1",
        "HF_HOME": "/hf",
        "HF_TOKEN": "secret",
        "PATH": "/bin",
        "AWS_KEY": "",
    }
    assert inherited(shell) == {"GLMD_PORT": "1", "HF_HOME": "/hf"}


def test_install_starts_the_service_with_arguments_and_environment(
    mac: Mac, spec: ServiceSpec
) -> None:
    manager = Launchd()
    assert manager.install(spec)
    server = wait_until_ready(manager, 60)
    assert server.health is not None
    assert server.health["model"] == "serve a model"
    assert server.memory > 0
    assert server.uptime > 0
    assert mac.calls[-2:] == [
        f"enable gui/{os.getuid()}/local.glmd",
        f"bootstrap gui/{os.getuid()} {mac.agent}",
    ]
    assert stat.S_IMODE(mac.agent.stat().st_mode) == 0o600
    assert plistlib.loads(mac.agent.read_bytes())["EnvironmentVariables"] == {
        "GLMD_API_KEY": "k&<y>",
        "GLMD_LOG_FILE": str(mac.log),
    }


def test_repeated_install_replaces_a_changed_service_only(mac: Mac, spec: ServiceSpec) -> None:
    manager = Launchd()
    manager.install(spec)
    first = wait_until_ready(manager, 60)
    asked = mac.calls
    assert not manager.install(spec)
    assert mac.calls == asked
    changed = ServiceSpec((*spec.arguments, "--port", "1"), {}, 40)
    assert manager.install(changed)
    second = wait_until_ready(manager, 60)
    assert second.pid != first.pid
    assert not psutil.pid_exists(first.pid)
    assert second.health is not None
    assert second.health["model"] == "serve a model --port 1"


def test_stop_ends_the_process_and_start_starts_another(mac: Mac, spec: ServiceSpec) -> None:
    manager = Launchd()
    manager.install(spec)
    first = wait_until_ready(manager, 60)
    manager.stop()
    assert not psutil.pid_exists(first.pid)
    state = manager.state()
    assert (state.installed, state.loaded, state.pid) == (True, False, None)
    manager.stop()
    manager.start()
    assert wait_until_ready(manager, 60).pid != first.pid
    asked = mac.calls
    manager.start()
    assert mac.calls == asked


def test_uninstall_removes_the_file_and_can_be_repeated(mac: Mac, spec: ServiceSpec) -> None:
    manager = Launchd()
    manager.install(spec)
    assert manager.uninstall()
    assert not mac.agent.exists()
    assert not manager.state().loaded
    assert not manager.uninstall()


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(
    mac: Mac, spec: ServiceSpec
) -> None:
    manager = Launchd()
    manager.install(ServiceSpec(spec.arguments, {"GLMD_FAIL": "1"}, 40))
    with pytest.raises(ServiceError) as caught:
        wait_until_ready(manager, 60)
    assert "exited with status 1" in caught.value.message
    assert "model.safetensors is damaged." in caught.value.message
    assert manager.state().last_exit == 1


def test_bootstrap_is_repeated_while_launchd_is_busy(mac: Mac, spec: ServiceSpec) -> None:
    mac.refuse("bootstrap", (37, "Bootstrap failed: 37: Operation already in progress"))
    manager = Launchd()
    manager.install(spec)
    assert wait_until_ready(manager, 60).url


@pytest.mark.parametrize("status", sorted(ADVICE.keys() - {36, 37}))
def test_a_failed_launchctl_is_quoted_with_a_remedy(
    mac: Mac, spec: ServiceSpec, status: int
) -> None:
    mac.refuse("bootstrap", (status, f"Bootstrap failed: {status}: Because\nTry root"))
    with pytest.raises(ServiceError) as caught:
        Launchd().install(spec)
    assert f"'Bootstrap failed: {status}: Because'" in caught.value.message
    assert ADVICE[status] in caught.value.message


def test_an_unknown_exit_status_is_quoted_too(mac: Mac, spec: ServiceSpec) -> None:
    mac.refuse("bootstrap", (99, "Bootstrap failed: 99: What"))
    with pytest.raises(ServiceError, match="launchctl error 99"):
        Launchd().install(spec)


def test_a_missing_launchctl_is_an_error(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(mac.home))
        with pytest.raises(ServiceError, match="No launchctl"):
            Launchd().state()


def test_nested_blocks_of_launchctl_print_are_ignored() -> None:
    printed = "gui/501/x = {\n\tpid = 7\n\tevent = {\n\t\tpid = 8\n\t}\n\truns = 2\n}"
    assert parse_fields(printed) == {"pid": "7", "runs": "2"}


def test_a_large_log_is_renamed_at_the_next_start(mac: Mac, spec: ServiceSpec) -> None:
    mac.log.parent.mkdir(parents=True)
    mac.log.write_bytes(b"x" * (LOG_BYTES + 1))
    manager = Launchd()
    manager.install(spec)
    wait_until_ready(manager, 60)
    assert mac.log.stat().st_size < LOG_BYTES
    assert mac.log.with_name("glmd.log.1").stat().st_size == LOG_BYTES + 1


def test_the_commands_install_report_log_and_remove(run: CliRunner, mac: Mac) -> None:
    assert run.invoke(commands.app, ["status"]).exit_code == 1
    done = run.invoke(commands.app, ["install", "zai-org/x", "--port", "0"])
    assert done.exit_code == 0, done.output
    assert "Ready: serve --service zai-org/x --port 0 at http://127.0.0.1:" in done.output

    done = run.invoke(commands.app, ["status", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.output)
    assert report["status"] == "ready"
    assert psutil.pid_exists(report["pid"])
    assert httpx.get(
        f"http://127.0.0.1:{report['port']}/health", trust_env=False, timeout=60
    ).is_success
    shown = run.invoke(commands.app, ["status"])
    for word in ("ready", str(report["pid"]), "GiB resident", "uptime", str(mac.agent)):
        assert word in shown.output

    first = report["pid"]
    assert run.invoke(commands.app, ["restart"]).exit_code == 0
    report = json.loads(run.invoke(commands.app, ["status", "--json"]).output)
    assert report["pid"] != first

    assert run.invoke(commands.app, ["stop"]).output == "Stopped.\n"
    report = json.loads(run.invoke(commands.app, ["status", "--json"]).output)
    assert (report["status"], report["pid"]) == ("stopped", None)
    assert mac.log.read_text().splitlines()[-1] == "asked"
    assert run.invoke(commands.app, ["uninstall"]).output == "Uninstalled.\n"
    assert "was not installed" in run.invoke(commands.app, ["uninstall"]).output


@pytest.mark.parametrize("command", ["start", "stop", "restart", "logs"])
def test_commands_without_an_installed_service_are_rejected(run: CliRunner, command: str) -> None:
    done = run.invoke(commands.app, [command])
    assert isinstance(done.exception, ServiceError)
    assert "glmd service install" in done.exception.message


def test_a_bad_setting_is_rejected_before_installation(run: CliRunner, mac: Mac) -> None:
    done = run.invoke(commands.app, ["install", "--port", "70000"])
    assert done.exit_code != 0
    assert not mac.agent.exists()


def test_a_system_without_service_manager_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(daemon, "BOOTED", tmp_path / "nothing")
    with pytest.raises(ServiceError, match="your own supervisor"):
        daemon.find_manager()
