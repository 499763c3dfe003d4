"""Chat templates in files, and the defaults for thinking at their head.

The card of the mixed 8/5-bit model recommends to put these lines in front of the template:

    {%- set enable_thinking = true -%}
    {%- set clear_thinking = false -%}

They set what a request asks for to the same value, whatever it asks for. Here they are defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmd.checkpoint.config import LFS_POINTER, describe_lfs_pointer, read_json_object
from glmd.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"

RECOMMENDED_THINKING = {"enable_thinking": True, "clear_thinking": False}
"""Variables of the template, with the values that the model card recommends."""

BASE_MODEL = "zai-org/GLM-4.7-Flash"

_NAMES = "|".join(RECOMMENDED_THINKING)
_SET = re.compile(rf"{{%[-+]?\s*set\s+({_NAMES})\s*=\s*([Tt]rue|[Ff]alse)\s*(-%}}\s*|\+?%}}\n?)")
_SKIPPED = re.compile(
    r"\s+|\{#.*?#\}"
    rf"|{{%-?\s*if ({_NAMES}) is not defined or \1 is none\s*-?%}}"
    r"\{%-?\s*set \1 = \w+\s*-?%\}\{%-?\s*endif\s*-?%\}",
    re.DOTALL,
)


def split_thinking(template: str) -> tuple[dict[str, bool], str]:
    """Take the leading lines that set the variables for thinking out of a template.

    Returns:
        the values that they set, and the template without these lines.
    """
    values: dict[str, bool] = {}
    kept, position = "", 0
    while True:
        if match := _SET.match(template, position):
            values[match[1]] = match[2].lower() == "true"
        elif match := _SKIPPED.match(template, position):
            kept += match[0]
        else:
            return values, kept + template[position:] if values else template
        position = match.end()


def with_thinking_defaults(template: str) -> str:
    """Put defaults for thinking in front of a template, unless they are there.

    The published template has others. Set in the template, the defaults also hold in LM Studio,
    oMLX and plain mlx-lm. An `if` at the top level of a Jinja template opens no scope, so the
    values hold for the rest of the template. The code renders to nothing.
    """
    values, rest = split_thinking(template)
    code = _defaults_code(RECOMMENDED_THINKING | values)
    if rest.startswith(code):
        return rest
    if values and rest.startswith(recommended := _defaults_code(RECOMMENDED_THINKING)):
        rest = rest.removeprefix(recommended)
    # Renderers with trim_blocks (transformers) drop a newline after the last tag.
    guard = '{{ "" }}' if rest.startswith("\n") else ""
    return code + guard + rest


def _defaults_code(values: Mapping[str, bool]) -> str:
    lines = [
        f"{{%- if {name} is not defined or {name} is none -%}}"
        f"{{%- set {name} = {str(value).lower()} -%}}{{%- endif -%}}"
        for name, value in values.items()
    ]
    head = "{#- Defaults that the model card recommends; a caller's own values win. -#}"
    return "\n".join([head, *lines]).removesuffix("-%}") + "%}"


def explain_remedy(folder: Path) -> str:
    """Where to get a template from."""
    return f"Take the model's own: `hf download {BASE_MODEL} {TEMPLATE_FILE} --local-dir {folder}`."


def read_template(folder: Path) -> tuple[str, Path]:
    """Read `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    Of several named templates in the latter, the one named `default`.

    Returns: the template, and its file.

    Raises:
        CheckpointError: no template, or the file is damaged.
    """
    file, config = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    if file.is_file():
        data = file.read_bytes()
        if data.startswith(LFS_POINTER):
            raise CheckpointError(f"{file}: {describe_lfs_pointer()}", file=str(file))
        try:
            return data.decode("utf-8-sig"), file
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{file}: not UTF-8: {error}. {explain_remedy(folder)}", file=str(file)
            ) from None
    source = read_json_object(config).get("chat_template") if config.is_file() else None
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source if is_named_template(entry)}
        source = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if source is None:
            raise CheckpointError(
                f"{config}: chat_template: none of {len(named)} templates is named default."
                " Name one so.",
                file=str(config),
            )
    if not isinstance(source, str):
        message = f"{folder}: no chat template ({TEMPLATE_FILE}). {explain_remedy(folder)}"
        raise CheckpointError(message, file=str(file))
    return source, config


def is_named_template(entry: Any) -> bool:
    """Whether this is an entry of a list of named templates."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(k), str) for k in ("name", "template")
    )
