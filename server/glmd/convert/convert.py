"""Conversion of a BF16 checkpoint in Hugging Face's layout to MLX files.

The files are planned from the headers of the source; then each weight is read, quantised and
written. The source is only read, and the output folder appears when it is complete
(`glmd.utils.files`). The MTP layer can also be added alone, to MLX files without it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
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
from glmd.checkpoint.layout import Component, main_weights, mtp_prefix
from glmd.checkpoint.stored import MTP_FILE, StoredWeights, read_weights
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
from glmd.utils.files import check_new, check_room, staged_folder, sync, write_error

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


def open_source(source: Path, *, mtp: bool) -> Source:
    """Open a checkpoint: read its headers and, with `mtp`, compare its vocabulary matrices.

    Args:
        mtp: the MTP layer is requested, if there is one.

    Raises:
        CheckpointError: not a complete, unquantised checkpoint in Hugging Face's layout.
    """
    config = load_config(source)
    if config.quantization is not None:
        raise CheckpointError(
            f"{source} is quantised already; glmd converts BF16, F16 or F32 checkpoints.",
            file=str(source),
        )
    stored = read_weights(source, config)
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
    """The text of tokenizer.json without truncation and padding; empty: it has neither.

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


_MAY_DIFFER = {
    "eos_token_ids", "max_position_embeddings", "mtp", "num_nextn_predict_layers", "pad_token_id",
    "quantization",
}  # fmt: skip
"""Configuration fields that do not determine the weights' shapes or use."""


def add_mtp(
    source: Path, folder: Path, recipe: Recipe, *, progress: Progress | None = None
) -> Conversion:
    """Add a checkpoint's MTP layer to MLX files made from the checkpoint without it.

    Writes `mtp.safetensors`, then its description in config.json, each under a temporary name
    first.

    Args:
        source: a folder in Hugging Face's layout that holds the layer.
        folder: MLX files of the same model, quantised or not.

    Raises:
        CheckpointError: the source holds no MTP layer, or the folder has one already, is of
            another model, or cannot be written.
    """
    opened = open_source(source, mtp=True)
    if not opened.has_mtp:
        raise CheckpointError(f"{source}: {opened.no_mtp}.", file=str(source))
    config = load_config(folder)
    stored = read_weights(folder, config)
    if stored.mtp:
        raise CheckpointError(f"{folder} has an MTP layer already.", file=str(folder))
    _check_same_model(opened, stored)
    plan = Plan((), opened.plan(recipe).mtp)
    raw = read_json_object(folder / "config.json")
    raw["num_nextn_predict_layers"] = 1
    raw["glmd"] = {**(raw.get("glmd") or {}), "mtp": opened.describe_mtp(plan)}
    writer = WeightWriter(opened.reader, total(plan.mtp).nbytes, progress)
    partial = folder / f".{MTP_FILE}.partial"
    config_partial = folder / ".config.json.partial"
    check_room(partial, writer.nbytes)
    try:
        partial.unlink(missing_ok=True)
        writer.write(partial, plan.mtp)
        write_json(config_partial, raw)
        sync(config_partial)
        partial.replace(folder / MTP_FILE)
        config_partial.replace(folder / "config.json")
        sync(folder)
    except OSError as error:
        raise write_error(folder, error, need=writer.nbytes) from error
    finally:
        partial.unlink(missing_ok=True)
        config_partial.unlink(missing_ok=True)
    return Conversion(plan, tuple(opened.notes(plan)))


_ROUNDING = 2.0**-7
"""Relative difference that two roundings in bfloat16's eight bits can make."""

_SMALL = 2.0**-24
"""Least positive number of float16: smaller weights become 0 in float16 files."""


def _check_same_model(opened: Source, stored: StoredWeights) -> None:
    """Compare dimensions, and the arrays that are never quantised: norms and routers.

    Converters round the router's bias to bfloat16, and everything to float16.
    """

    def differs(problem: str, tensor: str | None = None) -> CheckpointError:
        message = f"{stored.folder} is not of the model in {opened.folder}: {problem}."
        return CheckpointError(message, file=str(stored.folder), tensor=tensor)

    for field in stored.config.__struct_fields__:
        ours, theirs = getattr(opened.config, field), getattr(stored.config, field)
        if field not in _MAY_DIFFER and ours != theirs:
            raise differs(f"{field} is {theirs}, not {ours}")
    reader = WeightReader(stored.config, stored.main)
    for weight in main_weights(opened.config):
        if weight.component not in (Component.NORM, Component.ROUTER):
            continue
        ours, theirs = (r.read(weight).astype(mx.float32) for r in (opened.reader, reader))
        if not mx.allclose(ours, theirs, rtol=_ROUNDING, atol=_SMALL).item():
            raise differs(f"{weight.name} differs", weight.name)
