"""A BF16 checkpoint in Hugging Face's layout, opened for conversion."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from glmd.checkpoint.config import ModelConfig, MtpFile, load_config, normalise, read_json_object
from glmd.checkpoint.layout import (
    in_mlx_layout,
    main_weights,
    mtp_prefix,
    mtp_weights,
    source_shapes,
)
from glmd.checkpoint.weights import check_tensors, list_tensors
from glmd.convert.plan import Plan, plan_recipe
from glmd.convert.recipes import Recipe
from glmd.convert.weights import FLOATS, WeightReader, equal_bits
from glmd.errors import CheckpointError

MTP_FILE = "mtp.safetensors"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint whose headers agree with its config.

    Attributes:
        folder: where it lies.
        config: its configuration.
        reader: of its weights.
        has_mtp: it holds the MTP layer, and the layer is wanted.
        dropped_mtp: it holds the layer, which is not wanted.
        own_embedding: the layer's embedding differs from the main model's.
        own_head: the same of its head.
    """

    folder: Path
    config: ModelConfig
    reader: WeightReader
    has_mtp: bool
    dropped_mtp: bool
    own_embedding: bool
    own_head: bool

    def plan(self, recipe: Recipe) -> Plan:
        """What conversion by `recipe` writes."""
        return plan_recipe(
            self.config,
            recipe,
            mtp=self.has_mtp,
            own_embedding=self.own_embedding,
            own_head=self.own_head,
        )

    def notes(self, plan: Plan) -> list[str]:
        """What the user should know of `plan`, a sentence each."""
        notes = []
        if not self.has_mtp and not self.dropped_mtp:
            notes.append(f"{self.folder} holds no MTP layer, so the output has none.")
        every = plan.main + plan.mtp
        left = [p for p in every if p.weight.is_matrix and p.quantized is None]
        if left and any(p.quantized for p in every):
            notes.append(
                f"{len(left)} matrices, such as {left[0].weight.path}, stay in bfloat16: their last"
                " dimension is not a multiple of 64."
            )
        return notes

    def describe_mtp(self, plan: Plan) -> dict[str, Any]:
        """The entry `glmd.mtp` of config.json; see `MtpFile`."""
        table = {p.weight.path: p.quantized for p in plan.mtp if p.quantized is not None}
        described = MtpFile(
            file=MTP_FILE,
            shares_embedding=not self.own_embedding,
            shares_head=not self.own_head,
            quantization=table,
        )
        built: dict[str, Any] = msgspec.to_builtins(described)
        return built

    def config_json(self, recipe: Recipe, plan: Plan) -> dict[str, Any]:
        """The config.json of the conversion: the source's, and how the weights are stored."""
        raw = normalise(read_json_object(self.folder / "config.json"))
        raw |= {"dtype": "bfloat16", "num_nextn_predict_layers": int(self.has_mtp)}
        raw.pop("torch_dtype", None)  # the name that "dtype" had before transformers 5
        glmd: dict[str, Any] = {"recipe": recipe.name}
        if plan.mtp:
            glmd["mtp"] = self.describe_mtp(plan)
        raw["glmd"] = glmd
        if recipe.default is not None:
            default = msgspec.to_builtins(recipe.default)
            table = default | {
                p.weight.path: msgspec.to_builtins(p.quantized)
                for p in plan.main
                if p.quantized is not None and p.quantized != recipe.default
            }
            # mlx-lm reads the first; the hub's model tree the second.
            raw |= {"quantization": table, "quantization_config": table}
        return raw


def open_source(source: Path, *, mtp: bool) -> Source:
    """Open the checkpoint in folder `source`, reading its headers, and its vocabulary if `mtp`.

    Args:
        mtp: the MTP layer is wanted, if there is one.

    Raises:
        CheckpointError: it is not a whole, unquantised checkpoint in Hugging Face's layout.
    """
    config = load_config(source)
    if config.quantization is not None:
        raise CheckpointError(
            f"{source} is quantised already; glmd converts BF16, F16 or F32 checkpoints.",
            file=str(source),
        )
    tensors = list_tensors(source)
    if in_mlx_layout(tensors):
        raise CheckpointError(f"{source} is in MLX's layout already.", file=str(source))
    prefix = f"{mtp_prefix(config)}."
    there = any(name.startswith(prefix) for name in tensors)
    expected = source_shapes(
        chain(main_weights(config), mtp_weights(config) if there and mtp else ())
    )
    wanted = {n: t for n, t in tensors.items() if mtp or not n.startswith(prefix)}
    check_tensors(wanted, expected, folder=source, dtypes=frozenset(FLOATS))
    own_embedding = own_head = False
    if there and mtp:
        embedding, head = f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight"
        own_embedding = not equal_bits(tensors[embedding], tensors["model.embed_tokens.weight"])
        own_head = not equal_bits(tensors[head], tensors["lm_head.weight"])
    return Source(
        folder=source,
        config=config,
        reader=WeightReader(config, tensors),
        has_mtp=there and mtp,
        dropped_mtp=there and not mtp,
        own_embedding=own_embedding,
        own_head=own_head,
    )
