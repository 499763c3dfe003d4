"""Converted files, as mlx-lm, transformers and glmd read them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from paths import ROOT

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.chat_template import with_thinking_defaults
from glmd.checkpoint.config import RECOMMENDED, QuantizedAs, load_config, sampling_defaults
from glmd.checkpoint.layout import mtp_weights
from glmd.checkpoint.stored import read_weights
from glmd.checkpoint.weights import INDEX_NAME, list_tensors
from glmd.convert.add_mtp import add_mtp
from glmd.convert.convert import convert
from glmd.convert.inspect import inspect
from glmd.convert.recipes import RECIPES, plan_stored, total
from glmd.errors import CheckpointError
from glmd.model.loader import load_model as load_for_serving

TOKENS = mx.array([[256, 258, 263, 72, 101, 108, 108, 111, 264, 266, 3, 200]])
MIXED = RECIPES["mixed-8-5"]

TEMPLATE = (
    "[gMASK]<sop>{%- macro think() -%}{{ enable_thinking }}/{{ clear_thinking }}{%- endmacro -%}"
    "\n{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "<|assistant|>{{ '<think>' if enable_thinking else '</think>' }}"
    "{{ 'C' if clear_thinking is not defined or clear_thinking else 'K' }}\n"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_random_checkpoint(folder, shards=2)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "tiny-mlx"
    convert(source, out, MIXED, name="someone/tiny")
    return out


def _json(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def _load(file: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def _arrays(folder: Path) -> dict[str, mx.array]:
    files = folder.glob("model*.safetensors")
    return {name: array for file in files for name, array in _load(file).items()}


def _logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))


def _same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b))


def _by_recipe(path: str, module: object) -> dict[str, Any]:
    return {"group_size": 64, "bits": 5 if "switch_mlp" in path else 8, "mode": "affine"}


def test_every_array_is_bit_equal_to_mlx_lms_conversion(source: Path, converted: Path) -> None:
    model, config = load_model(source)  # mlx-lm's own stacking, splitting and quantising
    quantized, _ = quantize_model(model, config, 64, 5, quant_predicate=_by_recipe)
    theirs = dict(tree_flatten(quantized.parameters()))
    ours = _arrays(converted)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not _same(ours[name], theirs[name])] == []


def test_unmodified_mlx_lm_computes_the_logits_of_the_dequantised_weights(
    source: Path, converted: Path
) -> None:
    ours = _logits(converted)
    plain, _ = load_model(source)
    table = load_config(converted).quantization
    assert table is not None
    arrays = _arrays(converted)
    for name, scales in arrays.items():
        if not name.endswith(".scales"):
            continue
        path = name.removesuffix(".scales")
        how = table.of(path)
        assert how is not None
        whole = mx.dequantize(
            arrays[f"{path}.weight"].astype(mx.uint32),
            scales.astype(mx.float32),
            arrays[f"{path}.biases"].astype(mx.float32),
            group_size=how.group_size,
            bits=how.bits,
        )
        plain.load_weights([(f"{path}.weight", whole)], strict=False)
    plain.set_dtype(mx.float32)
    assert np.abs(ours - np.array(plain(TOKENS))).max() < 1e-3
    unquantised, _ = load_model(source)
    unquantised.set_dtype(mx.float32)
    assert np.abs(ours - np.array(unquantised(TOKENS))).max() > 1e-2  # so the test can tell


def test_theta_and_dense_layers_reach_mlx_lm_from_where_transformers_5_keeps_them(
    tmp_path: Path,
) -> None:
    common: dict[str, Any] = {"num_hidden_layers": 4, "num_nextn_predict_layers": 0, "seed": 1}
    write_random_checkpoint(tmp_path / "a", **common, first_k_dense_replace=2, rope_theta=5e3)
    write_random_checkpoint(
        tmp_path / "b",
        **common,
        rope_theta=None,
        first_k_dense_replace=None,
        rope_parameters={"rope_theta": 5e3, "rope_type": "default"},
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
    )
    for name in ("a", "b"):
        convert(tmp_path / name, tmp_path / f"{name}-mlx", RECIPES["uniform-8"])
    raw = _json(tmp_path / "b-mlx" / "config.json")
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e3
    assert (_logits(tmp_path / "a-mlx") == _logits(tmp_path / "b-mlx")).all()


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_plan_is_the_real_bytes_at_every_recipe(source: Path, tmp_path: Path, recipe: str) -> None:
    done = convert(source, tmp_path / "out", RECIPES[recipe])
    planned = total(done.plan.main, "")
    assert planned.nbytes == inspect(source, recipe).main.nbytes
    main = list_tensors(tmp_path / "out")
    assert sum(t.nbytes for t in main.values()) == planned.nbytes
    specs = {spec.name: spec for p in done.plan.main for spec in p.specs}
    assert {n: (t.dtype, t.shape) for n, t in main.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    found = inspect(tmp_path / "out")
    assert found.stored is not None
    assert found.stored.main_bytes == found.stored.main_planned
    assert found.stored.mtp_bytes == found.stored.mtp_planned > 0
    model, _ = load_model(tmp_path / "out")
    loaded = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert loaded == planned.nbytes


def test_index_tells_where_each_tensor_is_and_how_large_all_are(converted: Path) -> None:
    index = _json(converted / INDEX_NAME)
    tensors = list_tensors(converted)
    assert index["weight_map"] == dict.fromkeys(tensors, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == 1_006_864


def test_shards_stay_below_the_limit_and_load_in_mlx_lm(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", MIXED, shard_bytes=200_000)
    shards = sorted(tmp_path.glob("out/model-*-of-*.safetensors"))
    assert [f.name for f in shards] == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    tensors = list_tensors(tmp_path / "out")
    for shard in shards:
        assert sum(t.nbytes for t in tensors.values() if t.file == shard) <= 200_000
    assert (_logits(tmp_path / "out") == _logits(converted)).all()


def test_same_source_gives_the_same_bytes(source: Path, converted: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", MIXED, name="someone/tiny")
    again = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert again == {f.name: f.read_bytes() for f in converted.iterdir()}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_norms_and_router_are_bf16_and_the_correction_bias_float32(
    tmp_path: Path, dtype: Any
) -> None:
    write_random_checkpoint(tmp_path / "in", dtype=dtype)
    convert(tmp_path / "in", tmp_path / "out", RECIPES["uniform-4"])
    arrays, source = _arrays(tmp_path / "out"), _arrays(tmp_path / "in")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert _same(arrays[bias], source[bias])
    for name in ("model.norm.weight", "model.layers.2.mlp.gate.weight"):
        assert _same(arrays[name], source[name].astype(mx.bfloat16))
    assert arrays["lm_head.scales"].dtype == mx.bfloat16


def test_matrices_that_do_not_divide_into_groups_stay_bf16_and_are_reported(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in", qk_nope_head_dim=32, moe_intermediate_size=96)
    done = convert(tmp_path / "in", tmp_path / "out", MIXED)
    assert "stay in bfloat16" in done.notes[0]
    tensors = list_tensors(tmp_path / "out")
    assert tensors["model.layers.0.self_attn.embed_q.weight"].dtype == "BF16"
    assert "model.layers.1.mlp.switch_mlp.down_proj.scales" not in tensors
    assert _logits(tmp_path / "out").shape == (1, 12, 512)
    stored = inspect(tmp_path / "out").stored
    assert stored is not None
    assert stored.main_bytes == stored.main_planned


# The MTP layer


def test_mtp_layer_is_kept_in_a_file_that_plain_mlx_lm_ignores(converted: Path) -> None:
    config = load_config(converted)
    assert config.mtp is not None
    assert not any(name.startswith("model.layers.3.") for name in list_tensors(converted))
    tensors = read_weights(converted, config).mtp
    assert {t.file.name for t in tensors.values()} == {"mtp.safetensors"}
    assert {n: t.shape for n, t in tensors.items()} == {
        spec.name: spec.shape for p in plan_stored(config).mtp for spec in p.specs
    }
    assert "model.layers.3.mlp.switch_mlp.down_proj.scales" in tensors
    assert "model.layers.3.self_attn.embed_q.weight" in tensors
    assert config.mtp.quantization["model.layers.3.eh_proj"] == QuantizedAs(8)
    assert config.mtp.quantization["model.layers.3.mlp.switch_mlp.up_proj"] == QuantizedAs(5)


def test_mtp_arrays_equal_the_source(source: Path, converted: Path) -> None:
    arrays = _load(converted / "mtp.safetensors")
    theirs = _arrays(source)
    prefix = "model.layers.3"
    for name in ("enorm", "hnorm", "shared_head.norm", "input_layernorm"):
        assert _same(arrays[f"{prefix}.{name}.weight"], theirs[f"{prefix}.{name}.weight"])

    def whole(path: str, bits: int) -> mx.array:
        weight, scales, biases = (
            arrays[f"{path}.{part}"] for part in ("weight", "scales", "biases")
        )
        return mx.dequantize(weight, scales, biases, group_size=64, bits=bits)

    def close(a: mx.array, b: mx.array) -> bool:
        return bool(mx.allclose(a, b, rtol=0, atol=0.03))

    eh = f"{prefix}.eh_proj"
    assert close(whole(eh, 8), theirs[f"{eh}.weight"])
    experts = [theirs[f"{prefix}.mlp.experts.{e}.up_proj.weight"] for e in range(8)]
    assert close(whole(f"{prefix}.mlp.switch_mlp.up_proj", 5), mx.stack(experts))
    by_head = theirs[f"{prefix}.self_attn.kv_b_proj.weight"].reshape(4, 128, 64)
    embed_q = whole(f"{prefix}.self_attn.embed_q", 8)
    assert close(embed_q, by_head[:, :64].swapaxes(1, 2))
    assert close(whole(f"{prefix}.self_attn.unembed_out", 8), by_head[:, 64:])


def test_mtp_vocabulary_is_omitted_only_if_it_equals_the_main_models(
    converted: Path, tmp_path: Path
) -> None:
    mtp = load_config(converted).mtp
    assert mtp is not None
    assert mtp.shares_embedding
    assert mtp.shares_head
    assert "model.layers.3.embed_tokens.weight" not in _load(converted / mtp.file)

    write_random_checkpoint(tmp_path / "in", mtp_shares_vocabulary=False)
    convert(tmp_path / "in", tmp_path / "out", MIXED)
    own = load_config(tmp_path / "out").mtp
    assert own is not None
    assert not own.shares_embedding
    assert not own.shares_head
    arrays = _load(tmp_path / "out" / own.file)
    assert arrays["model.layers.3.shared_head.head.scales"].shape == (512, 2)
    assert own.quantization["model.layers.3.embed_tokens"] == QuantizedAs(8)


def test_mtp_layer_can_be_dropped(source: Path, converted: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", MIXED, mtp=False)
    assert not (tmp_path / "out" / "mtp.safetensors").exists()
    config = load_config(tmp_path / "out")
    assert config.mtp is None
    assert config.num_nextn_predict_layers == 0
    assert (_logits(tmp_path / "out") == _logits(converted)).all()


def test_a_source_without_mtp_layer_converts_and_says_so(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in", num_nextn_predict_layers=0)
    done = convert(tmp_path / "in", tmp_path / "out", MIXED)
    assert "has no MTP layer" in done.notes[0]
    assert load_config(tmp_path / "out").mtp is None


def test_mtp_layer_can_be_added_to_files_made_without(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", MIXED, mtp=False, name="someone/tiny")
    add_mtp(source, tmp_path / "out", MIXED)
    for name in ("mtp.safetensors", "config.json"):
        ours, theirs = (folder / name for folder in (tmp_path / "out", converted))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(CheckpointError, match="has an MTP layer already"):
        add_mtp(source, tmp_path / "out", MIXED)


def test_mtp_layer_can_be_added_to_files_of_mlx_lm(source: Path, tmp_path: Path) -> None:
    model, config = load_model(source)
    model, config = quantize_model(model, config, 64, 5, quant_predicate=_by_recipe)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    plain = inspect(tmp_path)
    assert plain.mtp is None
    assert plain.stored is not None
    assert plain.stored.main_bytes == plain.stored.main_planned == plain.main.nbytes
    add_mtp(source, tmp_path, MIXED)
    served = load_for_serving(tmp_path, "float32", lambda done, total: None)
    assert served.mtp is not None


def test_mtp_layer_is_not_added_to_another_model(source: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "other", seed=9, num_nextn_predict_layers=0)
    convert(tmp_path / "other", tmp_path / "out", MIXED)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match=r"not of the model in .*: .*norm\.weight differs"):
        add_mtp(source, tmp_path / "out", MIXED)
    with pytest.raises(CheckpointError, match="other: the checkpoint has no MTP layer"):
        add_mtp(tmp_path / "other", tmp_path / "out", MIXED)
    write_random_checkpoint(tmp_path / "wide", hidden_size=192)
    with pytest.raises(CheckpointError, match="hidden_size is 128, not 192"):
        add_mtp(tmp_path / "wide", tmp_path / "out", MIXED)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("shared", [True, False])
def test_the_server_loads_the_main_model_and_the_mtp_layer(tmp_path: Path, shared: bool) -> None:
    write_random_checkpoint(tmp_path / "in", mtp_shares_vocabulary=shared)
    convert(tmp_path / "in", tmp_path / "out", MIXED)
    model = load_for_serving(tmp_path / "out", "float32", lambda done, total: None)
    assert model.mtp is not None
    assert round(model.bits_per_weight, 3) == 7.354


# What comes along


def test_config_says_how_each_module_is_stored(converted: Path) -> None:
    raw = _json(converted / "config.json")
    assert raw["quantization"] == raw["quantization_config"]
    table = load_config(converted).quantization
    assert table is not None
    assert table.default == QuantizedAs(5, 64)
    assert set(table.modules.values()) == {QuantizedAs(8, 64)}
    assert "lm_head" in table.modules
    assert not any("switch_mlp" in path or path[-4:] == "gate" for path in table.modules)


def test_tokenizer_and_licence_come_along(source: Path, converted: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()


def test_generation_config_recommends_sampling_and_keeps_the_rest(converted: Path) -> None:
    raw = _json(converted / "generation_config.json")
    assert raw["eos_token_id"] == [256, 263, 265]
    assert sampling_defaults(converted) == RECOMMENDED


def test_model_card_tells_true_figures_with_units(source: Path, converted: Path) -> None:
    card = (converted / "README.md").read_text()
    main = sum(t.nbytes for t in list_tensors(converted).values())
    every = main + sum(
        t.nbytes for t in read_weights(converted, load_config(converted)).mtp.values()
    )
    assert f"| **main model** | 1,006,864 | 5, 8, bf16, f32 | {main:,} |" in card
    assert f"| {every:,} |" in card
    assert "base_model: someone/tiny" in card
    # Like for like: the same arrays in BF16, without the MTP layer's copy of the vocabulary.
    weights = mtp_weights(load_config(source), own_embedding=False, own_head=False)
    shapes = {name: each.source_shape for each in weights for name in each.sources}
    bf16 = 2 * 1_006_864 + 2 * 16
    assert f"Main model: {bf16 / 1e9:.3g} GB → {main / 1e9:.3g} GB, {bf16 / main:.2f}×" in card
    both = bf16 + 2 * sum(map(prod, shapes.values())) + 2 * 8
    assert f"{both / every:.2f}×" in card


# The chat template


def _render(template: str, *, trim: bool, **kwargs: Any) -> str:
    environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
    return environment.from_string(template).render(messages=[], **kwargs)


@pytest.mark.parametrize("trim", [False, True])
def test_template_defaults_to_thinking_kept_and_callers_win(trim: bool) -> None:
    template = with_thinking_defaults(TEMPLATE)
    start = "[gMASK]<sop><|assistant|>"
    assert _render(template, trim=trim).startswith(f"{start}<think>K")
    assert _render(template, trim=trim, enable_thinking=None, clear_thinking=None) == _render(
        template, trim=trim
    )
    off = _render(template, trim=trim, enable_thinking=False, clear_thinking=True)
    assert off.startswith(f"{start}</think>C")
    assert _render(template, trim=trim, enable_thinking=True) == _render(template, trim=trim)


def test_templates_of_the_models_form_behave_as_recommended() -> None:
    folder = ROOT / "demo" / "glm-4.7-flash-demo"
    original = (folder / "chat_template.jinja").read_text()
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
    ]

    def render(template: str, **kwargs: Any) -> str:
        loaded = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return loaded.render(messages=chat, add_generation_prompt=True, **kwargs)

    ours = with_thinking_defaults(original)
    assert "<think>because</think>b" in render(ours)
    assert "because" not in render(original)  # why the default must be put in
    for thinking in (True, False):
        for clear in (True, False):
            given = {"enable_thinking": thinking, "clear_thinking": clear}
            assert render(ours, **given) == render(original, **given)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("body", ["x", "\nx", "  x", "{%- if true %}x{% endif %}\n", "{# c #}x"])
def test_template_renders_otherwise_as_before(body: str, trim: bool) -> None:
    assert _render(with_thinking_defaults(body), trim=trim) == _render(body, trim=trim)


def test_defaults_are_put_in_once() -> None:
    once = with_thinking_defaults(TEMPLATE)
    assert with_thinking_defaults(once) == once
    assert once.count("set enable_thinking") == once.count("set clear_thinking") == 1


def test_transformers_applies_the_defaults_and_kwargs_win(converted: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    chat = [{"role": "user", "content": "hi"}]

    def render(**kwargs: Any) -> str:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **kwargs)
        return text

    assert render() == "[gMASK]<sop><|user|>hi<|assistant|><think>K"
    assert render(enable_thinking=False) == "[gMASK]<sop><|user|>hi<|assistant|></think>K"
    assert render(clear_thinking=True).endswith("<think>C")


@pytest.mark.parametrize("named", [False, True])
def test_templates_in_the_tokenizer_config_get_the_defaults_too(
    tmp_path: Path, named: bool
) -> None:
    write_random_checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer_config.json"
    template = [{"name": "default", "template": TEMPLATE}] if named else TEMPLATE
    file.write_text(json.dumps(_json(file) | {"chat_template": template}))
    done = convert(tmp_path / "in", tmp_path / "out", MIXED)
    assert not any("chat template" in note for note in done.notes)
    written = _json(tmp_path / "out" / "tokenizer_config.json")
    template = written["chat_template"][0]["template"] if named else written["chat_template"]
    assert template == with_thinking_defaults(TEMPLATE)
    assert written["eos_token"] == "<|endoftext|>"
