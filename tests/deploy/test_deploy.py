"""Files of deploy/: valid, and in agreement with `glmd service`."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launchd_keys import check_documented
from paths import ROOT

from glmd.cli.daemon.launchd import agent_plist
from glmd.cli.daemon.spec import EXIT_MARGIN, ServiceSpec
from glmd.config import Settings

DEPLOY = ROOT / "deploy"
EXIT_TIMEOUT = int(Settings.model_fields["drain_timeout"].default) + EXIT_MARGIN
DAEMON = "launchd/local.glmd.daemon.plist"


def plist(name: str) -> dict[str, Any]:
    value: dict[str, Any] = plistlib.loads((DEPLOY / name).read_bytes())
    return value


def test_launch_agent_equals_the_one_that_glmd_installs() -> None:
    by_hand = plist("launchd/local.glmd.plist")
    spec = ServiceSpec(tuple(by_hand["ProgramArguments"]), {}, EXIT_TIMEOUT)
    assert by_hand == agent_plist(spec, Path("/Users/YOU/Library/Logs/glmd/glmd.log"))


def test_launch_daemon_is_the_agent_with_its_own_user() -> None:
    daemon = plist(DAEMON)
    check_documented(daemon)
    for key in ("UserName", "GroupName"):
        assert daemon.pop(key) == "_glmd"
    assert daemon.pop("InitGroups") is False
    assert daemon.pop("WorkingDirectory") == "/opt/glmd"
    spec = ServiceSpec(
        tuple(daemon["ProgramArguments"]), daemon["EnvironmentVariables"], EXIT_TIMEOUT
    )
    assert daemon == agent_plist(spec, Path(daemon["StandardErrorPath"]), label="local.glmd.daemon")


def test_launchd_files_are_named_by_their_labels() -> None:
    for file in (DEPLOY / "launchd").iterdir():
        assert file.name == f"{plistlib.loads(file.read_bytes())['Label']}.plist"


def test_newsyslog_rotates_the_daemons_log_without_losing_lines() -> None:
    lines = (DEPLOY / "newsyslog" / "glmd.conf").read_text().splitlines()
    (entry,) = [line.split() for line in lines if line and not line.startswith("#")]
    log, owner, mode, count, size, when, flags = entry
    daemon = plist(DAEMON)
    assert log == daemon["StandardErrorPath"] == daemon["StandardOutPath"]
    assert owner == f"{daemon['UserName']}:{daemon['GroupName']}"
    assert re.fullmatch("[0-7]{3}", mode)
    assert int(count) > 0
    assert int(size) > 0
    assert when == "*"
    assert flags == "N", "Compression would cut the file while the server still writes to it."


def test_system_unit_passes_systemd_analyze(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("only on Linux with systemd")
    text = (DEPLOY / "systemd" / "glmd.service").read_text()
    file = tmp_path / "glmd.service"
    file.write_text(text.replace("/opt/glmd/venv/bin/glmd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert [line for line in done.stderr.splitlines() if file.name in line] == []


def test_system_unit_has_the_limits_of_the_launch_agent() -> None:
    text = (DEPLOY / "systemd" / "glmd.service").read_text()
    unit = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    agent_plist = plist("launchd/local.glmd.plist")
    assert int(unit["LimitNOFILE"]) == agent_plist["SoftResourceLimits"]["NumberOfFiles"]
    assert int(unit["RestartSec"]) == agent_plist["ThrottleInterval"]
    assert int(unit["TimeoutStopSec"]) == agent_plist["ExitTimeOut"]
    assert unit["Restart"] == "on-failure"
    assert unit["DynamicUser"] == "yes"


def test_formula_installs_the_command_and_the_service() -> None:
    text = (DEPLOY / "homebrew" / "glmd.rb").read_text()
    assert re.search(r"^class Glmd < Formula$", text, re.MULTILINE)
    for part in (
        'license "Apache-2.0"',
        'bin.install_symlink libexec/"bin/glmd"',
        'run [opt_bin/"glmd", "serve"]',
        "keep_alive successful_exit: false",
        "process_type :interactive",
        f"throttle_interval {plist('launchd/local.glmd.plist')['ThrottleInterval']}",
    ):
        assert part in text
    opened = len(re.findall(r"^\s*(?:class|def)\b|\bdo$", text, re.MULTILINE))
    assert opened == len(re.findall(r"^\s*end$", text, re.MULTILINE))


def test_formula_is_valid_ruby() -> None:
    if sys.platform != "darwin":
        pytest.skip("only on macOS, which has Ruby")
    subprocess.run(["ruby", "-c", str(DEPLOY / "homebrew" / "glmd.rb")], check=True)


def test_property_lists_pass_plutil() -> None:
    if sys.platform != "darwin":
        pytest.skip("only on macOS, which has plutil")
    files = [str(file) for file in (DEPLOY / "launchd").iterdir()]
    subprocess.run(["plutil", "-lint", *files], check=True)


def test_readme_lists_exactly_the_files_of_deploy() -> None:
    readme = (DEPLOY / "README.md").read_text()
    files = {str(file.relative_to(DEPLOY)) for file in DEPLOY.glob("*/*")}
    named = set(
        re.findall(
            r"(?:launchd|newsyslog|systemd|homebrew|prometheus|grafana|cluster|man|completions)"
            r"/[\w.-]*\w",
            readme,
        )
    )
    assert named - {"systemd/system"} == files  # /etc/systemd/system


def test_shell_blocks_of_the_readme_are_valid() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)


def test_manual_installation_replaces_every_placeholder(tmp_path: Path) -> None:
    block = re.search(r"^sed .*?\.plist$", (DEPLOY / "README.md").read_text(), re.DOTALL | re.M)
    assert block
    glmd = tmp_path / "bin" / "glmd"
    glmd.parent.mkdir()
    glmd.write_text("#!/bin/sh\n")
    glmd.chmod(0o755)
    (tmp_path / "Library" / "LaunchAgents").mkdir(parents=True)
    environment = {"HOME": str(tmp_path), "PATH": f"{glmd.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", block.group()], cwd=DEPLOY.parent, env=environment, check=True)
    written = tmp_path / "Library" / "LaunchAgents" / "local.glmd.plist"
    made = plistlib.loads(written.read_bytes())
    assert made["ProgramArguments"] == [str(glmd), "serve"]
    assert made["StandardErrorPath"] == f"{tmp_path}/Library/Logs/glmd/glmd.log"
    assert b"YOU" not in written.read_bytes()


def test_router_and_cluster_agree() -> None:
    router = plist("cluster/local.glmd.router.plist")
    check_documented(router)
    assert router["Label"] == "local.glmd.router"
    script = (DEPLOY / "cluster" / "cluster.sh").read_text()
    flags = [each for each in router["ProgramArguments"] if each.startswith("--")]
    assert set(re.findall(r"--[\w-]+", script.partition("smg}")[2])) == set(flags)
    subprocess.run(["sh", "-n", str(DEPLOY / "cluster" / "cluster.sh")], check=True)
    for name in re.findall(r"GLMD_([A-Z_]+)=", script):
        assert name.lower() in Settings.model_fields
