"""Reading config.json and generation_config.json, and refusing unsupported values."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paths import ROOT, TESTS

from glmd.checkpoint.config import (
    RECOMMENDED,
    ModelConfig,
    QuantizedAs,
    load_config,
    normalise,
    recommended_fields,
    sampling_defaults,
)
from glmd.errors import CheckpointError
from glmd.ipc import SamplingParams

FIXTURE = TESTS / "fixtures" / "glm-4.7-flash" / "config.json"
REAL: dict[str, Any] = json.loads(FIXTURE.read_text())


def _load(folder: Path, **changes: Any) -> ModelConfig:
    raw = {**REAL, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))
    return load_config(folder)


def _refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        _load(folder, **changes)
    assert error.value.file == str(folder / "config.json")
    assert "\n" not in error.value.message
    return error.value.message


def test_published_config_is_read_from_file_or_folder() -> None:
    config = load_config(FIXTURE)
    assert config == load_config(FIXTURE.parent)
    assert (config.num_hidden_layers, config.n_routed_experts) == (47, 64)
    assert config.rope_theta == 1e6
    assert config.eos_token_ids == (154820, 154827, 154829)
    assert config.num_nextn_predict_layers == 1
    assert config.quantization is None
    assert [config.is_dense(layer) for layer in (0, 1, 46)] == [True, False, False]


def test_config_is_immutable() -> None:
    with pytest.raises(AttributeError):
        load_config(FIXTURE).vocab_size = 1  # type: ignore[misc]


def test_reading_a_checkpoint_imports_no_mlx() -> None:
    modules = ["config", "hub", "layout", "weights"]
    imports = "; ".join(f"import glmd.checkpoint.{name}" for name in modules)
    code = f"import sys; {imports}; assert not any(m.split('.')[0] == 'mlx' for m in sys.modules)"
    env = {"PYTHONPATH": str(ROOT / "server")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_theta_is_found_where_transformers_5_puts_it(tmp_path: Path) -> None:
    rope = {"rope_theta": 12345.0, "rope_type": "default"}
    assert _load(tmp_path, rope_theta="gone", rope_parameters=rope).rope_theta == 12345
    assert _load(tmp_path, rope_theta=None, rope_parameters=rope).rope_theta == 12345
    message = _refusal(tmp_path, rope_theta="gone")
    assert "neither rope_theta nor rope_parameters.rope_theta" in message


def test_dense_layers_are_counted_from_mlp_layer_types(tmp_path: Path) -> None:
    kinds = ["dense"] * 2 + ["sparse"] * 45
    config = _load(tmp_path, first_k_dense_replace="gone", mlp_layer_types=kinds)
    assert config.first_k_dense_replace == 2
    assert "mlp_layer_types" in _refusal(
        tmp_path, first_k_dense_replace="gone", mlp_layer_types=kinds[::-1]
    )


def test_normalise_adds_the_keys_that_mlx_lm_reads_and_removes_none() -> None:
    raw = {"rope_parameters": {"rope_theta": 7.0}, "mlp_layer_types": ["dense", "dense", "sparse"]}
    assert normalise(raw) == raw | {"rope_theta": 7.0, "first_k_dense_replace": 2}
    assert normalise(REAL) == REAL


def test_mlx_lm_builds_the_same_model_from_the_typed_config() -> None:
    glm = pytest.importorskip("mlx_lm.models.glm4_moe_lite")
    ours = glm.ModelArgs.from_dict(msgspec.structs.asdict(load_config(FIXTURE)))
    assert dataclasses.asdict(ours) == dataclasses.asdict(glm.ModelArgs.from_dict(REAL))


def test_eos_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert _load(tmp_path, eos_token_id=1).eos_token_ids == (1, 2)
    assert _load(tmp_path, eos_token_id=None).eos_token_ids == (2, 1)
    assert "eos_token_id 154880 is outside" in _refusal(tmp_path, eos_token_id=154880)


def test_an_unsupported_model_type_is_named_with_the_supported_one(tmp_path: Path) -> None:
    message = _refusal(tmp_path, model_type="glm4_moe")
    assert 'model_type is "glm4_moe"' in message
    assert "glm4_moe_lite" in message
    assert "GLM-4.7-Flash" in message
    assert "model_type is null" in _refusal(tmp_path, model_type="gone")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("n_group", 8),
        ("topk_group", 4),
        ("topk_method", "greedy"),
        ("rope_interleave", False),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("num_key_value_heads", 4),
        ("num_nextn_predict_layers", 2),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization", {"bits": 4, "group_size": 32, "mode": "fp4"}),
    ],
)
def test_unsupported_settings_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    message = _refusal(tmp_path, **{key: value})
    said = {
        "quantization_config": "quantization_config.quant_method",
        "quantization": "quantization.default.mode",
    }
    assert said.get(key, key) in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "gone", "missing `hidden_size`"),
        ("hidden_size", "2048", "hidden_size: expected `int`, got `str`"),
        ("kv_lora_rank", 0, "kv_lora_rank: expected `int` >= 1"),
        ("q_lora_rank", None, "q_lora_rank: expected `int`, got `null`"),
        ("rms_norm_eps", -1.0, "rms_norm_eps"),
        ("num_experts_per_tok", 65, "more than n_routed_experts, 64"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim is 63"),
    ],
)
def test_malformed_values_are_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    assert said in _refusal(tmp_path, **{key: value})


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["../mtp.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\0"])
def test_the_mtp_file_cannot_be_outside_the_folder(tmp_path: Path, name: str) -> None:
    mtp = {"file": name, "shares_embedding": True, "shares_head": True, "quantization": {}}
    assert f"glmd.mtp.file is {json.dumps(name)}" in _refusal(tmp_path, glmd={"mtp": mtp})
    mtp["file"] = "mtp.safetensors"
    assert _load(tmp_path, glmd={"mtp": mtp}).mtp is not None


def test_code_in_a_checkpoint_is_refused_and_never_run(random_checkpoint: Path) -> None:
    """`model_file` is how a checkpoint brings mlx-lm its own Python."""
    loading = pytest.importorskip("glmd.model.loader")
    folder = random_checkpoint.parent / "with_code"
    shutil.copytree(random_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
    ran = folder / "ran"
    (folder / "model.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(CheckpointError, match=r'model_file is "model\.py", but glmd runs no code'):
        loading.load_model(folder, "float32", lambda done, total: None)
    assert not ran.exists()


def test_mlx_quantization_table_is_parted_into_default_and_modules(tmp_path: Path) -> None:
    table = {
        "bits": 5,
        "group_size": 64,
        "mode": "affine",
        "lm_head": {"bits": 8, "group_size": 32},
        "model.a": False,
        "model.b": True,
    }
    quantization = _load(tmp_path, quantization=table, quantization_config=table).quantization
    assert quantization is not None
    assert quantization.of("lm_head") == QuantizedAs(8, 32)
    assert quantization.of("model.a") is None
    assert quantization.of("model.b") == quantization.of("model.c") == QuantizedAs(5, 64)


def _sampling(folder: Path, **said: Any) -> SamplingParams:
    (folder / "generation_config.json").write_text(json.dumps(said))
    return sampling_defaults(folder)


def test_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    said = _sampling(tmp_path, temperature=0.7, top_p=0.9, eos_token_id=3)
    assert said == msgspec.structs.replace(RECOMMENDED, temperature=0.7, top_p=0.9)
    assert _sampling(tmp_path, temperature=1.0) == msgspec.structs.replace(
        RECOMMENDED, temperature=1.0
    )
    assert _sampling(tmp_path, top_k=-1).top_k == 0
    assert repr(_sampling(tmp_path, top_k=40.0).top_k) == "40"
    assert _sampling(tmp_path, **recommended_fields()) == RECOMMENDED
    assert _sampling(tmp_path, do_sample=False, temperature=0.7).temperature == 0


def test_sampling_defaults_without_generation_config_are_the_recommended(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == RECOMMENDED
    assert _sampling(tmp_path, eos_token_id=3, top_p=None) == RECOMMENDED
    assert SamplingParams(temperature=0.2, top_k=50, top_p=0.95, min_p=0.01) == RECOMMENDED


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": "50"},
        {"top_k": 1.5},
        {"top_k": -2},
        {"repetition_penalty": 0},
    ],
)
def test_sampling_out_of_range_is_refused_by_name(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(said))):
        _sampling(tmp_path, **said)
