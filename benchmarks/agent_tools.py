"""Twenty tools of a coding agent, in OpenAI's format."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _number(description: str, **more: Any) -> Schema:
    return {"type": "integer", "description": description, **more}


def _flag(description: str) -> Schema:
    return {"type": "boolean", "description": description, "default": False}


def _list(items: Schema, description: str, **more: Any) -> Schema:
    return {"type": "array", "items": items, "description": description, **more}


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _tool(name: str, description: str, required: tuple[str, ...], **properties: Schema) -> Schema:
    parameters = _object(required, **properties)
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


_PATH = _text("Absolute path of the file.")
_LINES = {
    "offset": _number("The first line to read, from 1.", minimum=1),
    "limit": _number("How many lines to read.", minimum=1, maximum=2000),
}
_EDIT = _object(
    ("old_text", "new_text"),
    old_text=_text("The text to replace; it must occur exactly once."),
    new_text=_text("What to put in its place."),
    replace_all=_flag("Replace every occurrence."),
)
_TASK = _object(
    ("title", "state"),
    title=_text("What is to be done.", maxLength=200),
    state={"enum": ["pending", "in_progress", "completed"]},
    priority={"enum": ["high", "medium", "low"]},
)
_COLUMN_VALUE = {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]}

AGENT_TOOLS: tuple[Schema, ...] = (
    _tool("read_file", "Read a text file, or some of its lines.", ("path",), path=_PATH, **_LINES),
    _tool(
        "write_file", "Write a file, replacing what is there.", ("path", "content"),
        path=_PATH, content=_text("The whole content."), create_folders=_flag("Make its folders."),
    ),
    _tool(
        "edit_file", "Replace pieces of a file's text.", ("path", "edits"),
        path=_PATH, edits=_list(_EDIT, "In the order in which they apply.", minItems=1),
    ),
    _tool(
        "list_folder", "List a folder.", ("path",),
        path=_text("Absolute path of the folder."),
        ignore=_list({"type": "string"}, "Glob patterns to leave out."),
        depth=_number("Levels below it.", minimum=1, maximum=8),
    ),
    _tool(
        "find_files", "Find files by a glob pattern.", ("pattern",),
        pattern=_text("Such as **/*.py."), root=_text("The folder to search in."),
        newest_first=_flag("Sort by time of change."),
    ),
    _tool(
        "search_text", "Search file contents with a regular expression.", ("pattern",),
        pattern=_text("A regular expression."), path=_text("File or folder."),
        glob=_text("Only files that match."), ignore_case=_flag("Ignore case."),
        context=_number("Lines around each match.", minimum=0, maximum=20),
        output={"enum": ["content", "files", "count"], "default": "content"},
    ),
    _tool(
        "run_command", "Run a shell command.", ("command",),
        command=_text("The command line."), folder=_text("Where to run it."),
        timeout_ms=_number("When to give up.", minimum=1, maximum=600_000),
        environment={"type": "object", "additionalProperties": {"type": "string"}},
        background=_flag("Return at once."),
    ),
    _tool(
        "read_output", "Read what a background command has printed.", ("process",),
        process=_text("Its id.", pattern="^p[0-9]+$"), filter=_text("A regular expression."),
    ),
    _tool(
        "stop_command", "End a background command.", ("process",),
        process=_text("Its id.", pattern="^p[0-9]+$"),
        signal={"enum": ["SIGINT", "SIGTERM", "SIGKILL"]},
    ),
    _tool(
        "run_tests", "Run the project's tests.", (),
        paths=_list({"type": "string"}, "Files or folders.", maxItems=50),
        only=_text("Names that match."), fail_fast=_flag("Stop at the first failure."),
    ),
    _tool(
        "git_diff", "Show changes.", (),
        base=_text("Commit or branch."), staged=_flag("Only what is staged."),
        paths=_list({"type": "string"}, "Only these."),
    ),
    _tool(
        "git_commit", "Commit what is staged.", ("message",),
        message=_text("Subject, blank line, body.", minLength=1),
        files=_list({"type": "string"}, "To stage first."), amend=_flag("Amend the last one."),
    ),
    _tool(
        "web_search", "Search the web.", ("query",),
        query=_text("What to look for.", minLength=2),
        count=_number("Results.", minimum=1, maximum=20),
        domains=_list({"type": "string", "format": "hostname"}, "Only these sites."),
        since=_text("Not older than.", format="date"),
    ),
    _tool(
        "fetch_page", "Fetch a page as Markdown.", ("url",),
        url=_text("Its address.", format="uri"), question=_text("What to look for in it."),
    ),
    _tool(
        "query_database", "Run one SQL statement, read-only.", ("sql",),
        sql=_text("The statement."), database={"enum": ["main", "analytics", "archive"]},
        parameters=_list(_COLUMN_VALUE, "Values for its placeholders."),
        limit=_number("Rows at most.", minimum=1, maximum=1000),
    ),
    _tool(
        "http_request", "Make an HTTP request.", ("method", "url"),
        method={"enum": ["GET", "POST", "PUT", "PATCH", "DELETE"]}, url=_text("", format="uri"),
        headers={"type": "object", "additionalProperties": {"type": "string"}},
        body={"anyOf": [{"type": "object"}, {"type": "array"}, {"type": "string"}]},
    ),
    _tool(
        "write_tasks", "Replace the list of tasks.", ("tasks",),
        tasks=_list(_TASK, "All of them.", minItems=1, maxItems=30),
    ),
    _tool(
        "ask_user", "Ask the user a question.", ("question",),
        question=_text("One question."),
        options=_list(
            _object(("label",), label=_text("A few words.", maxLength=40), detail=_text("")),
            "Answers to choose from.", minItems=2, maxItems=4,
        ),
    ),
    _tool(
        "create_event", "Put an event into the calendar.", ("title", "start"),
        title=_text(""), start=_text("", format="date-time"), end=_text("", format="date-time"),
        attendees=_list({"type": "string", "format": "email"}, "Who is invited.", maxItems=20),
        repeat=_object(
            ("every",), every={"enum": ["day", "week", "month"]},
            count=_number("Times.", minimum=1, maximum=52),
        ),
    ),
    _tool(
        "delegate", "Have another agent do a task and report.", ("task", "kind"),
        task=_text("All that it needs to know."), kind={"enum": ["explore", "review", "write"]},
        files=_list({"type": "string"}, "Where to begin."),
        budget=_number("Tokens at most.", minimum=1000, maximum=200_000),
    ),
)  # fmt: skip
