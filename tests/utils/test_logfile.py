"""Renaming, rotation and reopening of a log file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, os, subprocess, sys
from pathlib import Path
from glmd.utils.logging import LogFile

file = Path(sys.argv[1])
log_file = LogFile(file, limit=1000)
log_file.open()
logging.basicConfig()
print("printed", flush=True)
log_file.refresh()
os.rename(file, file.with_name("renamed"))
os.write(2, b"not lost\\n")
log_file.refresh()
subprocess.run(["echo", "a child"])
log_file.refresh()
print("x" * 2000, flush=True)
log_file.refresh()
os.write(2, b"after the large one\\n")
file.unlink()
file.mkdir()
log_file.refresh()
log_file.refresh()
file.rmdir()
log_file.refresh()
logging.getLogger("glmd").error("again")
"""


def test_a_renamed_or_large_log_is_reopened_without_losing_lines(tmp_path: Path) -> None:
    file = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == "", "all output is in the file"
    assert (tmp_path / "renamed").read_text() == "printed\nnot lost\n"
    rotated = (tmp_path / "log.1").read_text()
    assert rotated == "a child\n" + "x" * 2000 + "\n"
    assert file.read_text() == "ERROR:glmd:again\n"
