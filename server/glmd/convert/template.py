"""The chat template's defaults for thinking, where every program that renders it finds them.

The model card recommends `enable_thinking = true` and `clear_thinking = false`, but the published
template treats an absent value as it likes. Set at the template's head, the defaults hold in
LM Studio, oMLX and plain mlx-lm too, while a caller's own values still win.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmd.checkpoint.config import read_json_object

HEAD = (
    "{#- Defaults that the model card recommends; a caller's own values win. -#}\n"
    "{%- if enable_thinking is not defined or enable_thinking is none -%}"
    "{%- set enable_thinking = true -%}{%- endif -%}\n"
    "{%- if clear_thinking is not defined or clear_thinking is none -%}"
    "{%- set clear_thinking = false -%}{%- endif %}"
)
"""Renders to nothing. An `if` at the top level of a Jinja template opens no scope, so what it sets
holds for the rest of it."""


def with_thinking_defaults(template: str) -> str:
    """`template` with `HEAD` in front, once, and otherwise rendering as before."""
    if template.startswith(HEAD):
        return template
    # Renderers with trim_blocks (transformers) swallow a newline after the head's last tag.
    guard = '{{ "" }}' if template.startswith("\n") else ""
    return HEAD + guard + template


def templates_with_defaults(folder: Path) -> dict[str, str]:
    """The files of a checkpoint that hold chat templates, as they read with the defaults in.

    Templates lie in `chat_template.jinja`, or in `tokenizer_config.json` under `chat_template`: one
    string, or a list of named ones.

    Returns:
        The new text by file name; empty: there is no template.

    Raises:
        CheckpointError: tokenizer_config.json is malformed.
    """
    texts = {}
    file = folder / "chat_template.jinja"
    if file.exists():
        texts[file.name] = with_thinking_defaults(file.read_bytes().decode())
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        config = read_json_object(tokenizer)
        match config.get("chat_template"):
            case str(template):
                config["chat_template"] = with_thinking_defaults(template)
            case list(named) if all(_is_named(entry) for entry in named):
                config["chat_template"] = [
                    entry | {"template": with_thinking_defaults(entry["template"])}
                    for entry in named
                ]
            case _:
                return texts
        texts[tokenizer.name] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("template"), str)
