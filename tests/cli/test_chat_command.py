"""`glmd chat` in a pipe and in a terminal, and its commands."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import psutil
import pytest
from live import LiveServer, live_server
from rich.console import Console

from glmd.cli.chat_output import print_pieces, split_blocks
from glmd.cli.chat_session import COMMANDS, ChatClient, ChatSession, CommandError, run_command
from glmd.errors import ServerRefused

DIM = "\x1b[2m"

PROMPT = "\x1b[?2004h"
"""Bracketed paste is switched on: the prompt reads keys."""

SENT = "\x1b[?2004l"
"""Bracketed paste is switched off: the prompt has a message."""


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLMD_")}
    places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    return {
        **kept,
        **places,
        "TERM": "xterm-256color",
        "LC_ALL": "C.UTF-8",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # a terminal without cursor position reports
        **more,
    }


def piped(
    home: Path, *arguments: str, said: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glmd", "chat", *arguments],
        input=said, capture_output=True, text=True, check=False, timeout=120,
        env=environment(home, **more),
    )  # fmt: skip


# -- in a pipe --------------------------------------------------------------------------------


def test_a_pipe_gets_only_the_answer(scripted: LiveServer, tmp_path: Path) -> None:
    run = piped(tmp_path, "--url", scripted.url, said="⟦Hm.</think>Yes,\nno⟧\n")
    assert (run.stdout, run.stderr, run.returncode) == ("Yes,\nno\n", "", 0)


def test_argument_and_pipe_form_one_question(scripted: LiveServer, tmp_path: Path) -> None:
    run = piped(
        tmp_path, "⟦first⟧ is over", "--url", f"{scripted.url}/v1", "--no-think",
        "--profile", "tools", said="⟦{request}⟧",
    )  # fmt: skip
    assert json.loads(run.stdout)["sampling"]["temperature"] == 0.7


def test_the_api_key_comes_from_the_settings(tmp_path: Path) -> None:
    with live_server(api_key="s3cret") as live:
        run = piped(tmp_path, "⟦</think>Yes⟧", "--url", live.url, GLMD_API_KEY="s3cret")
        assert run.stdout == "Yes\n", run.stderr
        keys = tmp_path / "keys"
        keys.write_text("# mine\ns3cret\n")
        keys.chmod(0o600)
        run = piped(tmp_path, "⟦</think>Yes⟧", "--url", live.url, GLMD_API_KEY_FILE=str(keys))
        assert run.stdout == "Yes\n", run.stderr
        run = piped(tmp_path, "Hi", "--url", live.url)
        assert run.returncode == 1
        assert "GLMD_API_KEY" in run.stderr


def test_an_error_is_one_line_and_exit_code_1(scripted: LiveServer, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    for arguments, said, line in [
        (["Hi", "--url", nowhere], "", f"No server at {nowhere}"),
        (["--url", scripted.url], "⟦</think>One{raise}⟧", "stopped"),
        (["Hi", "--model", "./nowhere"], "", "nowhere"),
    ]:
        run = piped(tmp_path, *arguments, said=said)
        assert run.returncode == 1, run
        last = run.stderr.splitlines()[-1]
        assert last.startswith("glmd: "), run.stderr
        assert line in last
        assert "Traceback" not in run.stderr
    scripted.wait_for("ready")


# -- in a terminal ----------------------------------------------------------------------------


class Terminal:
    """`glmd chat` on a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-m", "glmd", "chat", *arguments]
            os.chdir(home)
            os.execve(sys.executable, command, environment(home))
        self._seen = b""

    def wait_for(self, text: str) -> str:
        """Return the output up to `text`, and drop it."""
        deadline = time.monotonic() + 120
        while text.encode() not in self._seen:
            assert time.monotonic() < deadline, self._seen.decode(errors="replace")
            if select.select([self._end], [], [], 1)[0]:
                try:
                    self._seen += os.read(self._end, 4096)
                except OSError as error:  # EIO on Linux, once the other side is closed
                    raise AssertionError(self._seen.decode(errors="replace")) from error
        before, _, self._seen = self._seen.partition(text.encode())
        return before.decode()

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def exit_code(self) -> int:
        """Wait for the exit; reads the output, because a full terminal blocks the process."""
        while True:
            try:
                if not os.read(self._end, 4096):
                    break
            except OSError:  # EIO on Linux, once the other side is closed
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self._end)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        os.close(self._end)
        os.waitpid(self.pid, 0)


def test_a_conversation_dims_reasoning_and_continues_after_ctrl_c(
    scripted: LiveServer, tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path, "--url", scripted.url)
    assert "test/tiny" in terminal.wait_for(PROMPT)
    terminal.type("⟦Hm.</think>Yes⟧\r")
    terminal.wait_for(DIM)
    terminal.wait_for("Yes")
    assert "per second" in terminal.wait_for("prompt tokens cached")
    terminal.wait_for(PROMPT)
    terminal.type("⟦</think>endless{wait}⟧\r")
    terminal.wait_for(SENT)
    terminal.wait_for("endless")
    terminal.type("\x03")
    terminal.wait_for("Stopped.")
    scripted.wait_until_idle()
    terminal.wait_for(PROMPT)
    terminal.type("/thnk\r")
    terminal.wait_for("did you mean think?")
    terminal.wait_for(PROMPT)
    terminal.type('"""two\r')
    terminal.type('⟦</think>lines⟧"""\r')
    terminal.wait_for(SENT)
    terminal.wait_for("lines")
    terminal.wait_for(PROMPT)
    terminal.type("half a question")
    terminal.wait_for("half a question")
    terminal.type("\x03")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_prompt_pastes_lines_recalls_messages_and_completes_commands(
    scripted: LiveServer, tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path, "--url", scripted.url, "--no-think")
    terminal.wait_for(PROMPT)
    terminal.type("\x1b[200~first\n⟦{request}⟧\x1b[201~\r")
    assert "tokens" in terminal.wait_for(PROMPT)
    terminal.type("one\x1b\rtwo ⟦Yes⟧\r")  # Alt-Enter
    terminal.wait_for(SENT)
    assert "Yes" in terminal.wait_for("tokens")
    terminal.wait_for(PROMPT)
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # up to the first line, then to the message before
    assert "first" in terminal.wait_for("tokens")
    terminal.wait_for(PROMPT)
    terminal.type("/sa")
    terminal.wait_for("/save")  # in the menu
    terminal.type("\t x.json\r")
    terminal.wait_for("Wrote x.json")
    terminal.wait_for(PROMPT)
    terminal.type("quit\r")
    assert terminal.exit_code() == 0
    asked = json.loads((tmp_path / "x.json").read_text())["messages"]
    assert [turn["content"] for turn in asked if turn["role"] == "user"] == [
        "first\n⟦{request}⟧",
        "one\ntwo ⟦Yes⟧",
        "first\n⟦{request}⟧",
    ]


def test_messages_of_earlier_conversations_are_recalled(
    scripted: LiveServer, tmp_path: Path
) -> None:
    for keys in ("⟦</think># Kept⟧\r", "\x1b[A\x1b[A\r"):
        terminal = Terminal(tmp_path, "--url", scripted.url)
        terminal.wait_for(PROMPT)
        terminal.type(keys)
        terminal.wait_for(SENT)
        answer = terminal.wait_for("tokens")
        assert "Kept" in answer
        terminal.wait_for(PROMPT)
        terminal.type("exit\r")
        assert terminal.exit_code() == 0
    (history,) = tmp_path.rglob("chat_history")
    assert history.stat().st_mode & 0o077 == 0


def test_a_server_started_for_the_conversation_ends_with_it(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "--demo", "--no-think")
    terminal.wait_for(PROMPT)
    server, *others = psutil.Process(terminal.pid).children()
    assert others == []
    terminal.type("\x03")  # does not stop the server
    terminal.wait_for(PROMPT)
    terminal.type("Hello, I am Nora.\r")
    terminal.wait_for(SENT)
    assert "Nora" in terminal.wait_for("tokens")
    terminal.wait_for(PROMPT)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.exit_code() == 128 + signal.SIGTERM
    server.wait(20)


def test_control_characters_of_an_answer_are_removed() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system=None)
    hostile = [("content", "a\x1b]0;title\x07b\nc\x9b2J")]
    print_pieces(iter(hostile), console, markdown=False)
    assert out.getvalue() == "a]0;titleb\nc2J"
    print_pieces(iter(hostile), console, markdown=True)
    assert "\x1b]" not in out.getvalue()
    assert "\x9b" not in out.getvalue()


MARKDOWN = """# Title

Some *text* with `code`.

- one
- two

| a | b |
| - | - |
| 1 | 2 |

```python
x = 1

# no heading
```
"""


@pytest.mark.parametrize("size", [1, 7, len(MARKDOWN)])
def test_markdown_is_formatted_block_by_block_as_if_it_came_at_once(size: int) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=40, height=30)
    pieces = [MARKDOWN[start : start + size] for start in range(0, len(MARKDOWN), size)]
    print_pieces((("content", piece) for piece in pieces), console, markdown=True)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "")
    final = plain[plain.rindex("Title") :]
    for line in ("• one", "• two", " a  b ", " x = 1"):
        assert line in final
    assert "```" not in final.rpartition("x = 1")[2]
    assert "**" not in final


def test_a_block_is_complete_when_the_next_one_begins() -> None:
    assert split_blocks("one\n\ntw") == ("one\n\n", "tw")
    assert split_blocks("- a\n\n- b\n") == ("", "- a\n\n- b\n")
    assert split_blocks("```\na\n\n# b\n") == ("", "```\na\n\n# b\n")


# -- commands ---------------------------------------------------------------------------------


@pytest.fixture
def session(scripted: LiveServer) -> Iterator[ChatSession]:
    client = ChatClient(scripted.url)
    yield ChatSession(client)
    client.close()


def test_commands_change_the_next_request(session: ChatSession) -> None:
    for line in (
        "/think off", "/system Be brief.", "/set temperature 0.5", "/set seed 7", "/set top_k 3",
        "/set top_k", "/model gpt-test",
    ):  # fmt: skip
        assert run_command(session, line)
    session.messages.append({"role": "user", "content": "Hi"})
    assert session.body == {
        "model": "gpt-test",
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
        ],
        "enable_thinking": False,
        "temperature": 0.5,
        "seed": 7,
    }  # fmt: skip
    run_command(session, "/clear")
    run_command(session, "/system")
    run_command(session, "/think auto")
    assert session.body["messages"] == []
    assert "enable_thinking" not in session.body


def test_model_lists_models_with_profiles_and_rejects_unknown_names(
    session: ChatSession,
) -> None:
    assert "test/tiny:tools" in run_command(session, "/model")
    with pytest.raises(ServerRefused, match="Model 'gpt-9' not found"):
        run_command(session, "/model gpt-9")
    assert session.model == "default"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sve x", "did you mean save?"),
        ("/think maybe", "on, off or auto"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature hot", "must be a number, not 'hot'"),
        ("/save", "one file name"),
        ("/save /nowhere/at/all", "No such file"),
        ("/retry", "no question yet"),
    ],
)
def test_a_wrong_command_is_an_error(session: ChatSession, line: str, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        run_command(session, line)
    assert message in caught.value.message


def test_save_writes_json_or_markdown_and_overwrites_nothing(
    session: ChatSession, tmp_path: Path
) -> None:
    session.messages += [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"},
    ]
    run_command(session, f"/save {tmp_path}/a.json")
    assert json.loads((tmp_path / "a.json").read_text())["messages"] == session.messages
    run_command(session, f"/save '{tmp_path}/b c.md'")
    assert (tmp_path / "b c.md").read_text() == "## user\n\nHi\n\n## assistant\n\nHo\n"
    with pytest.raises(CommandError, match="exists"):
        run_command(session, f"/save {tmp_path}/a.json")


def test_retry_repeats_the_last_question(session: ChatSession) -> None:
    session.messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    run_command(session, "/retry")
    assert (session.messages, session.retry) == ([], "Hi")


def test_help_lists_every_command_and_exit_ends(session: ChatSession) -> None:
    text = run_command(session, "/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    with pytest.raises(EOFError):
        run_command(session, "/exit")
