"""Generate docs/reference.md, tables of other pages, man page and completions from the code.

python tools/book.py            write the pages
python tools/book.py --check    exit with status 1 if a page is not current
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import ByteSize, SecretStr
from typer.completion import get_completion_script  # type: ignore[attr-defined]

from glmd.api.app import create_app
from glmd.api.client_settings import CLIENTS, Endpoint, describe_parts
from glmd.api.state import AppState, ServedModel
from glmd.checkpoint.config import ModelConfig, load_config
from glmd.cli.config import format_size
from glmd.cli.connect import find_client
from glmd.cli.main import app as cli
from glmd.config import PREFIX, Settings
from glmd.convert.inspect import inspect
from glmd.convert.recipes import DEFAULT_RECIPE, RECIPES
from glmd.engine.config import EngineConfig
from glmd.engine.memory import plan_memory, recommended_working_set
from glmd.engine_client.process import EngineProcessConfig
from glmd.errors import CheckpointError
from glmd.utils.text import gib

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DEPLOY = ROOT / "deploy"
DEMO = ROOT / "demo" / "glm-4.7-flash-demo"
CONFIG = ROOT / "tests" / "fixtures" / "glm-4.7-flash" / "config.json"

MACS = (16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""Memory sizes in GB of Macs with Apple silicon, from 16 on."""

ON_MACS = ("mixed-8-4", "mixed-8-5", "mixed-8-6", "uniform-8")
GIB = 2**30


def memory_table() -> Iterator[str]:
    """Yield the table of KV capacity in tokens, by memory size and recipe."""
    config = load_config(CONFIG)
    found = {recipe: inspect(CONFIG, recipe) for recipe in ON_MACS}
    sizes = {name: (each.main.nbytes, each.mtp.nbytes) for name, each in found.items() if each.mtp}
    heads = [f"`{name}`: {sum(sizes[name]) / GIB:.1f} GiB" for name in ON_MACS]
    yield f"| memory | for the GPU | {' | '.join(heads)} |"
    yield "|---:|---:|" + "---:|" * len(ON_MACS)
    for memory in MACS:
        budget = recommended_working_set(memory)
        cells = [memory_cell(config, budget, *sizes[recipe]) for recipe in ON_MACS]
        yield f"| {memory} GB | {budget / GIB:.1f} GiB | {' | '.join(cells)} |"
    yield ""
    yield (
        "8: KV in 8 bit, by the default of `kv_bits`. s: prompts in smaller chunks, which is"
        " slower. n: without the MTP layer."
    )


def memory_cell(config: ModelConfig, budget: int, main: int, mtp: int) -> str:
    """Return the tokens that fit in `budget` bytes, and what is given up for them."""
    try:
        plan = plan_memory(
            CONFIG, config, EngineConfig(), budget, weights=main, mtp_weights=mtp, item=2
        )
    except CheckpointError:
        return "–"
    marks = {
        "8": plan.kv_bits == 8,
        "s": plan.config.max_step_tokens < EngineConfig().max_step_tokens,
        "n": plan.config.mtp == 0,
    }
    text = " ".join(mark for mark, holds in marks.items() if holds)
    return f"{plan.kv_tokens // 1000:,}k {text}".strip()


def components_table() -> Iterator[str]:
    """Yield the table of `glmd inspect` for the default recipe."""
    found = inspect(CONFIG)
    yield "| | parameters | bits | GiB | bits per weight |"
    yield "|---|---:|---|---:|---:|"
    for line in (*found.components, found.main, found.mtp):
        assert line is not None
        yield (
            f"| {line.component} | {line.parameters:,} | {line.bits} | {gib(line.nbytes)} |"
            f" {line.bits_per_weight:.3f} |"
        )


def recipes_table() -> Iterator[str]:
    """Yield the table of recipes and model sizes."""
    yield "| recipe | routed experts | every other matrix | main model | with the MTP layer |"
    yield "|---|---|---|---:|---:|"
    for recipe in RECIPES.values():
        found = inspect(CONFIG, recipe.name)
        assert found.mtp is not None
        experts, others = (f"{n} bit" if n else "bf16" for n in (recipe.experts, recipe.others))
        default = " (default)" if recipe.name == DEFAULT_RECIPE else ""
        main, both = found.main.nbytes, found.main.nbytes + found.mtp.nbytes
        yield (
            f"| `{recipe.name}`{default} | {experts} | {others} | {main / GIB:.2f} GiB |"
            f" {both / GIB:.2f} GiB |"
        )


def settings_table() -> Iterator[str]:
    """Yield the table of settings."""
    yield "| setting | environment | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in Settings.model_fields.items():
        default = field.default
        if default in (None, (), {}):
            shown = ""
        elif isinstance(default, ByteSize):
            shown = f"`{format_size(default)}`"
        elif isinstance(default, dict):
            shown = f"`{','.join(f'{key}={value}' for key, value in default.items())}`"
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        meaning = field.description or ""
        if SecretStr in get_args(field.annotation):
            meaning += " Better in the environment than on the command line."
        yield f"| `{name}` | `{PREFIX}{name.upper()}` | {shown} | {escaped(meaning)} |"


def reference() -> Iterator[str]:
    """Yield the page of all routes and objects, from the OpenAPI document."""
    model = ServedModel.of("MODEL", DEMO)
    document = create_app(
        AppState(Settings.model_validate({}), model, EngineProcessConfig(DEMO, {}))
    ).openapi()
    schemas: dict[str, Any] = document["components"]["schemas"]
    yield "# Reference\n"
    yield "Every route and every object, from the OpenAPI document that a running server has at"
    yield "`/openapi.json`. What the fields mean is in [parameters](parameters.md).\n"
    tag = None
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                yield f"## {tag}\n"
            yield from route(path, method, operation)
    yield "## Objects\n"
    for name in sorted(schemas, key=title):
        yield from describe(name, schemas[name])


def route(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n"
    yield f"{operation.get('description', '').strip()}\n"
    body = operation.get("requestBody", {}).get("content", {})
    for content in body.values():
        yield f"Takes {kind(content['schema'])}.\n"
    for parameter in operation.get("parameters", ()):
        yield f"`{parameter['name']}` ({parameter['in']}): {kind(parameter['schema'])}.\n"
    for mime, content in operation["responses"]["200"].get("content", {}).items():
        if content.get("schema"):
            streamed = ", a server-sent event each" if mime == "text/event-stream" else ""
            yield f"Answers with {kind(content['schema'])}{streamed}.\n"


def describe(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {title(name)} {{ #{slug(name)} }}\n"
    if schema.get("description"):
        yield f"{first_paragraph(schema['description'])}\n"
    if "properties" not in schema:
        yield f"{kind(schema)}\n"
        return
    required = schema.get("required", [])
    yield "| field | type | |"
    yield "|---|---|---|"
    for field, value in schema["properties"].items():
        notes = [limits(value), escaped(value.get("description", ""))]
        if field in required:
            notes.insert(0, "required")
        elif value.get("default") is not None:
            notes.insert(0, f"default `{value['default']}`")
        yield f"| `{field}` | {kind(value)} | {'; '.join(filter(None, notes))} |"
    yield ""


def kind(schema: dict[str, Any]) -> str:
    """Return the type of a schema, in Markdown."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{title(name)}](#{slug(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            kinds = [kind(each) for each in schema[key] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def limits(schema: dict[str, Any]) -> str:
    """Return the bounds of a number or a length."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<",
             "minLength": "length ≥", "maxLength": "length ≤", "minItems": "items ≥",
             "maxItems": "items ≤"}  # fmt: skip
    parts = [schema, *schema.get("anyOf", ())]
    return ", ".join(f"{signs[k]} {part[k]:,}" for part in parts for k in signs if k in part)


def title(name: str) -> str:
    """`TextDelta (responses)` of `glmd__api__responses__objects__TextDelta`."""
    *_, package, _, last = ["", "", *name.split("__")]
    return f"{last} ({package})" if package else last


def slug(name: str) -> str:
    return "object-" + name.lower().replace("__", "-")


def first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


SHOWN = Endpoint("http://127.0.0.1:8000", None, 65_536)
"""The server in docs/clients.md."""


def client_settings(name: str) -> Iterator[str]:
    """Yield a client's settings as `glmd connect` prints them."""
    yield f"`glmd connect {name}` prints, `--write` writes, `--launch` starts it with:\n"
    for title, text, language in describe_parts(find_client(name).setup(SHOWN)):
        if title:
            yield f"`{title.removeprefix('# ')}`:\n"
        yield f"```{language}\n{text}\n```" if language else text


TABLES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "clients.md": {client.name: partial(client_settings, client.name) for client in CLIENTS},
    "conversion.md": {"recipes": recipes_table},
    "memory.md": {"memory": memory_table, "components": components_table},
    "settings.md": {"settings": settings_table},
}


def man_page() -> str:
    """Return the man page of the command, with the help of each subcommand."""
    command: Any = typer.main.get_command(cli)
    top = command.make_context("glmd", [], resilient_parsing=True)
    lines = [
        '.TH GLMD 1 "" "glmd" "User Commands"',
        ".SH NAME",
        "glmd \\- server for GLM-4.7-Flash on Apple silicon",
        ".SH SYNOPSIS",
        ".B glmd",
        "COMMAND [OPTIONS] [ARGUMENTS]",
        ".SH COMMANDS",
    ]

    def describe(group: Any, context: Any, prefix: str) -> None:
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            if found.hidden:
                continue
            words = f"{prefix} {name}"
            with found.make_context(words, [], parent=context, resilient_parsing=True) as inner:
                lines.extend([".SS", roff(words), roff(" ".join((found.help or "").split()))])
                if hasattr(found, "list_commands"):
                    describe(found, inner, words)
                    continue
                for parameter in found.get_params(inner):
                    record = parameter.get_help_record(inner)
                    if record is not None:
                        lines.extend([".TP", roff(record[0]), roff(" ".join(record[1].split()))])

    describe(command, top, "glmd")
    lines += [
        ".SH FILES",
        roff("~/.config/glmd/config.toml: settings. ~/.config/glmd: keys."),
        ".SH ENVIRONMENT",
        roff("Every setting can be set as GLMD_NAME, such as GLMD_PORT. See `glmd config show`."),
    ]
    return "\n".join(lines) + "\n"


def roff(text: str) -> str:
    """Escape a line of text for a man page."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


COMPLETIONS = {"bash": "glmd.bash", "zsh": "_glmd", "fish": "glmd.fish"}


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the expected text of each file that is generated or has a generated table."""
    yield DEPLOY / "man" / "glmd.1", man_page()
    for shell, file in COMPLETIONS.items():
        script = get_completion_script(prog_name="glmd", complete_var="_GLMD_COMPLETE", shell=shell)
        yield DEPLOY / "completions" / file, script.strip() + "\n"
    yield DOCS / "reference.md", "\n".join(reference()).rstrip() + "\n"
    for name, tables in TABLES.items():
        text = (DOCS / name).read_text()
        for mark, table in tables.items():
            begin, end = f"<!-- {mark}: written by tools/book.py -->\n", f"<!-- end of {mark} -->"
            head, rest = text.split(begin, 1)
            tail = rest.split(end, 1)[1]
            text = head + begin + "\n" + "\n".join(table()) + "\n\n" + end + tail
        yield DOCS / name, text


def main() -> int:
    stale = [
        (file, text) for file, text in pages() if not file.exists() or file.read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        # Files in deploy/ are phrased by typer, and change with its version.
        stale = [(file, text) for file, text in stale if not file.is_relative_to(DEPLOY)]
        for file, _ in stale:
            print(f"{file.relative_to(ROOT)}: not current. Run `python tools/book.py`.")
        return int(bool(stale))
    for file, text in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
