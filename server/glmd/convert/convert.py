"""From a BF16 checkpoint in Hugging Face's layout to MLX files by a recipe.

The plan is made first, from the headers; then weight after weight is read, quantised and written
to the place that the plan gave it. Memory holds one weight at a time (see `glmd.convert.weights`),
the source is only read, and the output appears whole or not at all (see `glmd.convert.atomic_dir`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from glmd.checkpoint.config import read_json_object
from glmd.checkpoint.generation_config import FILE_NAME as GENERATION_CONFIG
from glmd.checkpoint.generation_config import SAMPLING_FIELDS, recommended_fields
from glmd.convert.atomic_dir import check_new, staged_folder
from glmd.convert.hf_checkpoint import MTP_FILE, open_source
from glmd.convert.model_card import model_card
from glmd.convert.plan import SHARD_BYTES, shard, total
from glmd.convert.recipes import RECIPES, Recipe
from glmd.convert.template import templates_with_defaults
from glmd.convert.writer import (
    Conversion,
    Progress,
    Report,
    shard_names,
    write_index,
    write_json,
    write_weights,
)
from glmd.errors import CheckpointError

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE",
    "LICENSE.txt", "LICENSE.md",
)  # fmt: skip
"""What a checkpoint holds beside weights and configuration, as far as it is there."""


def convert(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    mtp: bool = True,
    name: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Convert the checkpoint in `source` into a new folder `out`.

    Args:
        source: a folder in Hugging Face's layout, in BF16, F16 or F32.
        out: must not exist, nor lie in `source`.
        recipe: which bits go where.
        mtp: keep the MTP layer, if there is one.
        name: what the model card calls the source, such as its hub id; None: its folder's name.
        progress: told how far it is.
        shard_bytes: the most tensor bytes in one file.

    Raises:
        CheckpointError: the source is not what it should be, or `out` cannot be written.
    """
    check_new(out)
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} lies in {source}, which must not change.", file=str(out))
    opened = open_source(source, mtp=mtp)
    plan = opened.plan(recipe)
    whole = opened.plan(RECIPES["bf16"])
    every = plan.main + plan.mtp
    parts = shard(plan.main, shard_bytes)
    extra = [file for file in COPIED if (source / file).is_file()]
    need = total(every, "").nbytes + sum((source / file).stat().st_size for file in extra)
    report = Report(progress, total(every, "").nbytes)
    notes = opened.notes(plan)
    generation, templates = _generation_config(source), templates_with_defaults(source)
    if not templates:
        notes.append(f"{source} has no chat template; the output has none either.")
    with staged_folder(out, need=need) as folder:
        for file, part in shard_names(parts):
            write_weights(folder / file, part, opened.reader, report)
        if plan.mtp:
            write_weights(folder / MTP_FILE, plan.mtp, opened.reader, report)
        write_index(folder, parts)
        for file in extra:
            shutil.copyfile(source / file, folder / file)
        for file, text in templates.items():
            (folder / file).write_bytes(text.encode())
        write_json(folder / GENERATION_CONFIG, generation)
        card = model_card(source=name or source.resolve().name, recipe=recipe, plan=plan,
                          whole=whole)  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "config.json", opened.config_json(recipe, plan))
    return Conversion(plan, tuple(notes))


def _generation_config(source: Path) -> dict[str, Any]:
    """The source's, sampling replaced by the recommendation for these quantised files."""
    file = source / GENERATION_CONFIG
    raw = read_json_object(file) if file.exists() else {}
    kept = {key: value for key, value in raw.items() if key not in SAMPLING_FIELDS}
    return kept | recommended_fields()
