"""Conversion of a BF16 checkpoint in Hugging Face's layout to MLX files.

The files are planned from the headers of the source; then each weight is read, quantised and
written. The source is only read, and the output folder appears when it is complete
(`glmd.utils.files`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from glmd.checkpoint.chat_template import (
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    is_named_template,
    read_template,
    with_thinking_defaults,
)
from glmd.checkpoint.config import FILE_NAME as GENERATION_CONFIG
from glmd.checkpoint.config import (
    SAMPLING_FIELDS,
    ModelConfig,
    MtpFile,
    load_config,
    normalise,
    read_json_object,
    recommended_fields,
)
from glmd.checkpoint.layout import mtp_prefix
from glmd.checkpoint.stored import MTP_FILE, read_mtp_source, read_weights
from glmd.convert.inspect import model_card
from glmd.convert.recipes import RECIPES, SHARD_BYTES, Plan, Recipe, plan_recipe, shard, total
from glmd.convert.weights import (
    Progress,
    WeightReader,
    WeightWriter,
    equal_bits,
    name_shards,
    read_importance,
    write_index,
    write_json,
)
from glmd.errors import CheckpointError
from glmd.utils.files import check_new, staged_folder

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE",
    "LICENSE.txt", "LICENSE.md",
)  # fmt: skip
"""Files copied from the source, if present."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        plan: the arrays written.
        notes: sentences for the user.
    """

    plan: Plan
    notes: tuple[str, ...]


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
        out: must not exist, nor be inside `source`.
        mtp: keep the MTP layer, if there is one.
        name: the source's name in the model card, such as its hub id; None: its folder's name.
        shard_bytes: maximum tensor bytes per file.

    Raises:
        CheckpointError: the source is not supported or damaged, or `out` cannot be written.
    """
    check_new(out)
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} is inside {source}, which must not change.", file=str(out))
    opened = open_source(source, mtp=mtp)
    plan, unquantized = opened.plan(recipe), opened.plan(RECIPES["bf16"])
    copied = [file for file in COPIED if (source / file).is_file()]
    writer = WeightWriter(
        opened.reader, total(plan.all).nbytes, progress, read_importance(recipe.importance)
    )
    need = writer.nbytes + sum((source / file).stat().st_size for file in copied)
    notes = opened.notes(plan)
    generation, templates = _generation_config(source), templates_with_defaults(source)
    texts = templates | tokenizer_without_limits(source)
    if not templates:
        notes.append(f"{source} has no chat template; the output has none either.")
    with staged_folder(out, need=need) as folder:
        files = name_shards(shard(plan.main, shard_bytes))
        for file, weights in files.items():
            writer.write(folder / file, weights)
        if plan.mtp:
            writer.write(folder / MTP_FILE, plan.mtp)
        write_index(folder, files)
        for file in copied:
            shutil.copyfile(source / file, folder / file)
        for file, text in texts.items():
            (folder / file).write_bytes(text.encode())
        write_json(folder / GENERATION_CONFIG, generation)
        card = model_card(name or source.resolve().name, recipe, plan, unquantized)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "config.json", opened.config_json(recipe, plan))
    return Conversion(plan, tuple(notes))


# -- source ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A BF16 checkpoint whose headers agree with its config.

    Attributes:
        has_mtp: it holds the MTP layer, which is requested.
        no_mtp: why the layer is missing although it is requested, as a clause; None: it is not
            missing.
        warnings: sentences for the user.
        own_embedding, own_head: the MTP layer's embedding or head differs from the main model's.
    """

    folder: Path
    config: ModelConfig
    reader: WeightReader
    has_mtp: bool
    no_mtp: str | None
    warnings: tuple[str, ...]
    own_embedding: bool
    own_head: bool

    def plan(self, recipe: Recipe) -> Plan:
        return plan_recipe(
            self.config,
            recipe,
            mtp=self.has_mtp,
            own_embedding=self.own_embedding,
            own_head=self.own_head,
        )

    def notes(self, plan: Plan) -> list[str]:
        """Sentences for the user about `plan`."""
        notes = list(self.warnings)
        if self.no_mtp is not None:
            notes.append(f"The output has no MTP layer: {self.no_mtp}.")
        left = [p for p in plan.all if p.weight.is_matrix and p.quantized is None]
        if left and any(p.quantized for p in plan.all):
            notes.append(
                f"{len(left)} matrices, such as {left[0].weight.path}, stay in bfloat16: their last"
                " dimension is not a multiple of 64."
            )
        return notes

    def describe_mtp(self, plan: Plan) -> dict[str, Any]:
        """The entry `glmd.mtp` of config.json; see `MtpFile`."""
        described = MtpFile(
            file=MTP_FILE,
            shares_embedding=not self.own_embedding,
            shares_head=not self.own_head,
            quantization={p.weight.path: p.quantized for p in plan.mtp if p.quantized is not None},
        )
        built: dict[str, Any] = msgspec.to_builtins(described)
        return built

    def config_json(self, recipe: Recipe, plan: Plan) -> dict[str, Any]:
        """The source's config.json, with the quantisation of the weights."""
        raw = normalise(read_json_object(self.folder / "config.json"))
        raw |= {"dtype": "bfloat16", "num_nextn_predict_layers": int(self.has_mtp)}
        raw.pop("torch_dtype", None)  # The name of "dtype" before transformers 5.
        glmd: dict[str, Any] = {"recipe": recipe.name}
        if plan.mtp:
            glmd["mtp"] = self.describe_mtp(plan)
        if recipe.search is not None:
            glmd["search"] = msgspec.to_builtins(recipe.search.summary)
        raw["glmd"] = glmd
        if recipe.default is not None:
            table: dict[str, Any] = msgspec.to_builtins(recipe.default)
            for p in plan.main:
                if p.quantized is not None and p.quantized != recipe.default:
                    table[p.weight.path] = msgspec.to_builtins(p.quantized)
                elif p.quantized is None and p.weight.is_matrix and recipe.modules is not None:
                    table[p.weight.path] = False
            # mlx-lm reads the first key; the hub's model tree the second.
            raw |= {"quantization": table, "quantization_config": table}
        return raw


def open_source(source: Path, *, mtp: bool, mtp_only: bool = False) -> Source:
    """Open a checkpoint: read headers, with `mtp` compare vocabulary matrices.

    Args:
        mtp: the MTP layer is requested, if there is one.
        mtp_only: the main model is not read, so its other files may be missing.

    Raises:
        CheckpointError: not a complete, unquantised checkpoint in Hugging Face's layout.
    """
    config = load_config(source)
    if config.quantization is not None:
        raise CheckpointError(
            f"{source} is quantised already; glmd converts BF16, F16 or F32 checkpoints.",
            file=str(source),
        )
    stored = (read_mtp_source if mtp_only else read_weights)(source, config)
    if stored.is_mlx:
        raise CheckpointError(f"{source} is in MLX's layout already.", file=str(source))
    tensors, prefix = {**stored.main, **stored.mtp}, f"{mtp_prefix(config)}."
    has_mtp = bool(stored.mtp) and mtp
    own_embedding, own_head = stored.mtp_vocabulary if has_mtp else (False, False)
    if own_embedding:
        own, shared = tensors[f"{prefix}embed_tokens.weight"], tensors["model.embed_tokens.weight"]
        own_embedding = not equal_bits(own, shared)
    if own_head:
        own, shared = tensors[f"{prefix}shared_head.head.weight"], tensors["lm_head.weight"]
        own_head = not equal_bits(own, shared)
    return Source(
        folder=source,
        config=config,
        reader=WeightReader(config, tensors),
        has_mtp=has_mtp,
        no_mtp=stored.no_mtp if mtp else None,
        warnings=stored.warnings,
        own_embedding=own_embedding,
        own_head=own_head,
    )


# -- other files ----------------------------------------------------------------------------


def _generation_config(source: Path) -> dict[str, Any]:
    """The source's file, with the sampling recommended for quantised weights."""
    file = source / GENERATION_CONFIG
    raw = read_json_object(file) if file.exists() else {}
    kept = {key: value for key, value in raw.items() if key not in SAMPLING_FIELDS}
    return kept | recommended_fields()


def templates_with_defaults(folder: Path) -> dict[str, str]:
    """Add defaults for thinking to the files of a checkpoint that hold chat templates.

    Templates are in `chat_template.jinja`, or in `tokenizer_config.json` under `chat_template`: a
    string, or a list of named templates.

    Returns:
        the new text by file name; empty: there is no template.

    Raises:
        CheckpointError: a file is malformed.
    """
    texts = {}
    if (folder / TEMPLATE_FILE).exists():
        texts[TEMPLATE_FILE] = with_thinking_defaults(read_template(folder)[0])
    tokenizer = folder / TOKENIZER_CONFIG
    config = read_json_object(tokenizer) if tokenizer.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, str):
        config["chat_template"] = with_thinking_defaults(template)
    elif isinstance(template, list) and all(map(is_named_template, template)):
        config["chat_template"] = [
            entry | {"template": with_thinking_defaults(entry["template"])} for entry in template
        ]
    else:
        return texts
    texts[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts


def tokenizer_without_limits(folder: Path) -> dict[str, str]:
    """The text of tokenizer.json without truncation and padding.

    Empty: it has neither.

    `save_pretrained` writes those of the last call, which then hold for every text.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return {}
    tokenizer = read_json_object(file)
    if tokenizer.get("truncation") is None and tokenizer.get("padding") is None:
        return {}
    tokenizer |= {"truncation": None, "padding": None}
    return {file.name: json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n"}
