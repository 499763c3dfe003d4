"""Checkpoints as people have them, and the result of serving each: the table of docs/conversion.md.

`python tests/support/file_variants.py` builds them all and writes the table.
"""

from __future__ import annotations

import codecs
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from chat_kit import TEMPLATE
from mlx_lm.utils import load_model as load_mlx_lm
from mlx_lm.utils import quantize_model, save_config, save_model
from paths import ROOT

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.checkpoint.config import load_config, sampling_defaults
from glmd.checkpoint.stored import StoredWeights, read_weights
from glmd.checkpoint.weights import INDEX_NAME
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES
from glmd.errors import GlmdError
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel, load_model

PAGE = ROOT / "docs" / "conversion.md"
BEGIN, END = "<!-- files: written by tests/support/file_variants.py -->\n", "<!-- end of files -->"

WEIGHTS = "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n"
CARD_LINES = "{%- set enable_thinking = true -%}\n{%- set clear_thinking = false -%}\n"
BY_ROLE = """
[gMASK]<sop>
{%- for message in messages -%}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] -%}
    {{- '<|' + role + '|>' -}}
    {%- if message.reasoning_content and not clear_thinking -%}
        <think>{{ message.reasoning_content }}</think>
    {%- endif -%}
    {{- message.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{ '<think>' if enable_thinking else '</think>' }}
{%- endif -%}
""".strip()

TOKENS = (5, 6, 7, 8)
_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.0\.down_proj\.weight")


@dataclass(frozen=True)
class Served:
    """A checkpoint that is served."""

    stored: StoredWeights
    tokenizer: Tokenizer
    template: ChatTemplate
    model: LoadedModel

    @property
    def drafts(self) -> bool:
        return self.model.mtp is not None

    def logits(self) -> npt.NDArray[np.float32]:
        rows, model = len(TOKENS), self.model
        tails = TailPool(model.kv_layers, model.shape.kv_width, model.dtype)
        chunk = PrefillChunk(0, rows, [], expanded=False, logits_rows=rows)
        batch = ForwardBatch(mx.array(TOKENS, mx.int32), mx.arange(rows), [], [chunk])
        return np.array(model.logits(model.forward(batch, tails)[0]))


def serve(folder: Path) -> Served:
    """Load all that the server loads."""
    config = load_config(folder)
    stored = read_weights(folder, config)
    sampling_defaults(folder)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer.controls)
    model = load_model(folder, "auto", lambda done, total: None)
    model.warm_up()
    return Served(stored, tokenizer, template, model)


# -- building -------------------------------------------------------------------------------


class Bases:
    """The checkpoints that variants are made of."""

    def __init__(self, root: Path) -> None:
        self.published, self.converted = root / "published", root / "converted"
        write_random_checkpoint(self.published, num_hidden_layers=2, n_routed_experts=4)
        (self.published / "chat_template.jinja").write_text(TEMPLATE)
        convert(self.published, self.converted, RECIPES["mixed-8-5"])


def change_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON object; None removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def change_arrays(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    file = folder / WEIGHTS
    arrays = dict(cast(dict[str, mx.array], mx.load(str(file))))
    change(arrays)
    mx.save_safetensors(str(file), arrays)


def quantize(arrays: dict[str, mx.array], path: str) -> None:
    parts = mx.quantize(arrays.pop(f"{path}.weight"), group_size=64, bits=8)
    for name, part in zip(("weight", "scales", "biases"), parts, strict=True):
        arrays[f"{path}.{name}"] = part


def fuse_experts(arrays: dict[str, mx.array]) -> None:
    for prefix in [match[1] for name in arrays if (match := _EXPERTS.fullmatch(name))]:

        def take(projection: str, prefix: str = prefix) -> mx.array:
            return mx.stack([arrays.pop(f"{prefix}.{e}.{projection}.weight") for e in range(4)])

        gate_up = mx.concatenate([take("gate_proj"), take("up_proj")], axis=1)
        arrays[f"{prefix}.gate_up_proj"] = gate_up
        arrays[f"{prefix}.down_proj"] = take("down_proj")


def by_mlx_lm(base: Path, folder: Path, mode: str, bits: int, group: int) -> None:
    """Make of `base` what `mlx_lm.convert -q` makes of it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder / name)
    model, config = load_mlx_lm(base)
    model, config = quantize_model(model, config, group, bits, mode=mode)
    save_model(folder, model)
    save_config(config, folder / "config.json")


def quantize_kv_b(arrays: dict[str, mx.array]) -> None:
    for layer in range(2):
        quantize(arrays, f"model.layers.{layer}.self_attn.kv_b_proj")
    for name in [name for name in arrays if name.startswith("model.layers.2.")]:
        del arrays[name]


def prune_experts(arrays: dict[str, mx.array]) -> None:
    """Leave two of four experts in the main model, and the MTP layer as it was."""
    for name in [n for n in arrays if re.match(r"model\.layers\.1\.mlp\.experts\.[23]\.", n)]:
        del arrays[name]
    for name in ("weight", "e_score_correction_bias"):
        arrays[f"model.layers.1.mlp.gate.{name}"] = arrays[f"model.layers.1.mlp.gate.{name}"][:2]


def rename_mtp(arrays: dict[str, mx.array]) -> None:
    for name in [name for name in arrays if name.startswith("model.layers.2.")]:
        arrays[name.replace("model.layers.2.", "mtp.layers.0.")] = arrays.pop(name)


def cast_arrays(arrays: dict[str, mx.array], dtype: mx.Dtype) -> None:
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating):
            arrays[name] = array.astype(dtype)


def poison(arrays: dict[str, mx.array]) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    arrays[name] = mx.full(arrays[name].shape, float("nan"), mx.bfloat16)


def clear(arrays: dict[str, mx.array]) -> None:
    for name, array in arrays.items():
        arrays[name] = mx.zeros_like(array)


def write_stale_index(folder: Path) -> None:
    names = {
        f"model.layers.{i}.mlp.weight": f"model-{i:05d}-of-00048.safetensors" for i in range(1, 49)
    }
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": names}))


def clear_mode(folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())["quantization"]
    change_json(folder / "config.json", quantization=table | {"mode": None})


def interrupt_download(folder: Path) -> None:
    write_random_checkpoint(folder, num_hidden_layers=2, n_routed_experts=4, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def limit_tokenizer(folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    change_json(folder / "tokenizer.json", truncation=truncation, padding=padding)


def set_template(folder: Path, template: str, **other: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": template}]
    named += [{"name": name, "template": text} for name, text in other.items()]
    change_json(folder / "tokenizer_config.json", chat_template=named)


def add_bom(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())


def make_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapters.safetensors").touch()


def keep_only(folder: Path, name: str) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).touch()


# -- variants -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Files, and the checkpoint that they are made of.

    Attributes:
        files: as the docs describe them.
        build: changes the copy in `folder`.
        base: "published", "converted", or None for an empty folder.
        remark: what the docs say beside "served"; the warning or reason, if there is one, follows.
        equal: logits equal those of the base.
    """

    id: str
    files: str
    build: Callable[[Path], object] = lambda folder: None
    base: str | None = "published"
    remark: str = ""
    equal: bool = True

    def write(self, bases: Bases, folder: Path) -> None:
        if self.base is None:
            folder.mkdir()
        else:
            shutil.copytree(getattr(bases, self.base), folder)
        self.build(folder)


def _arrays(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], object]:
    return lambda folder: change_arrays(folder, change)


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "config.json", **changes)


def _both(*builds: Callable[[Path], object]) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        for each in builds:
            each(folder)

    return build


def _mode(mode: str, bits: int, group: int) -> Variant:
    def build(folder: Path) -> None:
        by_mlx_lm(folder.parent / "published", folder, mode, bits, group)

    files = f"`mlx_lm.convert -q --q-mode {mode}`"
    return Variant(mode, files, build, base=None, equal=False)


VARIANTS = (
    Variant("published", "the published BF16 layout"),
    Variant("converted", "`glmd convert`", base="converted"),
    Variant("fused", "fused experts (`experts.gate_up_proj`, transformers 5)",
            _arrays(fuse_experts)),
    Variant("float16", "float16", _arrays(lambda a: cast_arrays(a, mx.float16)),
            remark="in bfloat16; as they are with the setting `dtype = \"float16\"`", equal=False),
    _mode("affine", 4, 64),
    _mode("mxfp4", 4, 32),
    _mode("mxfp8", 8, 32),
    _mode("nvfp4", 4, 16),
    Variant("null", "`quantization.mode: null`", clear_mode, base="converted", remark="as affine"),
    Variant("kv_b", "`kv_b_proj` quantised whole",
            _both(_arrays(quantize_kv_b), _config(quantization={"bits": 8, "group_size": 64})),
            equal=False),
    Variant("index", f"an old `{INDEX_NAME}`, of files that are not there", write_stale_index),
    Variant("interrupted", "a file of the index is missing", interrupt_download, base=None),
    Variant("twice", "the same tensors in two `model*.safetensors`",
            lambda f: shutil.copy(f / WEIGHTS, f / "model-copy.safetensors")),
    Variant("fuse", "`mlx_lm.fuse` of converted files: no `mtp.safetensors`",
            lambda f: (f / "mtp.safetensors").unlink(), base="converted"),
    Variant("undescribed", "`mtp.safetensors` without `glmd.mtp` in `config.json`",
            _config(glmd=None), base="converted"),
    Variant("mtp-quantised", "an MTP layer in the main files, quantised",
            _both(_arrays(lambda a: quantize(a, "model.layers.2.eh_proj")))),
    Variant("pruned", "pruned experts, and the MTP layer of the model before",
            _both(_arrays(prune_experts), _config(n_routed_experts=2)), equal=False),
    Variant("mtp-names", "an MTP layer under other names", _arrays(rename_mtp)),
    Variant("truncation", "`tokenizer.json` with truncation or padding", limit_tokenizer,
            remark="both off"),
    Variant("eos", "`config.json` with few or no end tokens",
            _both(_config(eos_token_id=256), lambda f: (f / "generation_config.json").unlink()),
            remark="those of `config.json`, `generation_config.json` and the tokenizer, and every"
                   " role tag, end a turn"),
    Variant("temperature", "`generation_config.json` with a temperature alone",
            lambda f: change_json(f / "generation_config.json", temperature=1.0, top_k=-1),
            remark="what it does not set is that of the model card; `top_k` -1 is off"),
    Variant("card", "a template that begins with the model card's `set enable_thinking = true`",
            lambda f: (f / "chat_template.jinja").write_text(CARD_LINES + TEMPLATE),
            remark="as a default that a request overrides"),
    Variant("by-role", "a template that makes its tags of `message.role`",
            lambda f: (f / "chat_template.jinja").write_text(BY_ROLE)),
    Variant("named", "several named templates",
            lambda f: set_template(f, TEMPLATE, tool_use="{{ messages }}"),
            remark="with the one named `default`"),
    Variant("bom", "a byte order mark in JSON or in the template", add_bom),
    Variant("adapter-inside", "`adapters.safetensors` beside the model",
            lambda f: (f / "adapters.safetensors").touch()),
    Variant("adapter", "a LoRA adapter", make_adapter),
    Variant("gguf", "GGUF", lambda f: keep_only(f, "model.gguf")),
    Variant("pickle", "`pytorch_model.bin`", lambda f: keep_only(f, "pytorch_model.bin")),
    Variant("lfs", "a Git LFS pointer", lambda f: (f / WEIGHTS).write_text(LFS)),
    Variant("lfs-tokenizer", "a Git LFS pointer as `tokenizer.json`",
            lambda f: (f / "tokenizer.json").write_text(LFS)),
    Variant("no-tokenizer", "no `tokenizer.json`", lambda f: (f / "tokenizer.json").unlink()),
    Variant("no-template", "no chat template", lambda f: (f / "chat_template.jinja").unlink()),
    Variant("no-tool", "a template without a tool role",
            lambda f: set_template(f, TEMPLATE.replace("<|observation|>", ""))),
    Variant("tied", "tied embeddings", _config(tie_word_embeddings=True)),
    Variant("fp8", "FP8, AWQ, GPTQ and other formats",
            _config(quantization_config={"quant_method": "fp8"})),
    Variant("nan", "a weight with NaN", _arrays(poison)),
    Variant("zeros", "weights that are all zeros", _arrays(clear)),
)  # fmt: skip


def describe(variant: Variant, folder: Path, outcome: Served | GlmdError) -> str:
    """The row of the docs."""
    if isinstance(outcome, GlmdError):
        said = f"refused: {outcome.message}"
    else:
        stored = outcome.stored
        said = ", ".join(filter(None, ("served", variant.remark)))
        notes = [*stored.warnings, *([stored.no_drafts] if stored.no_drafts else [])]
        said = " ".join([f"{said}.", *notes]) if notes else said
    said = said.replace(str(folder), "FOLDER").replace("|", "\\|").rstrip(".")
    return f"| {variant.files} | {re.sub(r'[ ]+', ' ', said)} |"


def outcomes(root: Path) -> Iterator[tuple[Variant, Path, Served | GlmdError]]:
    """Build all variants below `root`, and try to serve each."""
    bases = Bases(root)
    for variant in VARIANTS:
        folder = root / f"{variant.id}-variant"
        variant.write(bases, folder)
        try:
            yield variant, folder, serve(folder)
        except GlmdError as error:
            yield variant, folder, error


def table(rows: list[str]) -> str:
    return "\n".join(["", "| files | result |", "|---|---|", *rows, "", ""])


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        rows = [describe(*each) for each in outcomes(Path(root))]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
