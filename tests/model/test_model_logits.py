"""The forward pass gives transformers' logits, and mlx-lm's for the files that mlx-lm writes.

Where the two differ glmd follows transformers:

- epsilon of the norms of query and key-value latents: transformers 1e-6 (the default of its
  RMSNorm), mlx-lm `rms_norm_eps`, 1e-5;
- router logits: transformers in float32, mlx-lm in the model's dtype;
- theta: transformers 5 saves it as `rope_parameters.rope_theta`, mlx-lm reads `rope_theta`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from engines import TINY, load, one_shot_logits, reference_logits, tiny_model
from mlx_lm.convert import convert
from mlx_lm.models.glm4_moe_lite import group_expert_select
from mlx_lm.utils import load_model as load_mlx_model

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.errors import SettingsError
from glmd.model.loader import load_model
from glmd.model.moe import COMPILED_ROWS, MixtureOfExperts
from golden import make as golden

TOLERANCE = 1e-3
"""Of logits in float32; they spread over some ±10."""

BOTH_FORMS = pytest.mark.parametrize("expanded", [False, True], ids=["absorbed", "expanded"])


def _tokens(count: int = 80, vocabulary: int = 320) -> npt.NDArray[np.int32]:
    return np.random.default_rng(1).integers(0, vocabulary, count).astype(np.int32)


# -- transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    digest = golden.write_checkpoint(folder)
    stored = str(np.load(golden.FILE)["digest"])
    assert digest == stored, "random checkpoints have changed: run tests/golden/make.py"
    return folder


@BOTH_FORMS
def test_logits_equal_those_stored_from_transformers(golden_folder: Path, expanded: bool) -> None:
    stored = np.load(golden.FILE)
    logits = one_shot_logits(load(golden_folder), stored["tokens"], expanded=expanded)
    assert stored["logits"].std() > 2
    np.testing.assert_allclose(logits, stored["logits"], atol=TOLERANCE, rtol=0)


@BOTH_FORMS
@pytest.mark.parametrize("rows", [1, 2, COMPILED_ROWS, COMPILED_ROWS + 1])
def test_a_few_rows_which_run_compiled_give_the_same(
    golden_folder: Path, rows: int, expanded: bool
) -> None:
    stored = np.load(golden.FILE)
    assert len(stored["tokens"]) > COMPILED_ROWS
    model = load(golden_folder)
    for _ in range(2):  # recorded, and played
        logits = one_shot_logits(model, stored["tokens"][:rows], expanded=expanded)
        np.testing.assert_allclose(logits, stored["logits"][:rows], atol=TOLERANCE, rtol=0)


def test_theta_is_found_where_transformers_5_puts_it(golden_folder: Path, tmp_path: Path) -> None:
    stored = np.load(golden.FILE)
    config = json.loads((golden_folder / "config.json").read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    for file in golden_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = one_shot_logits(load(tmp_path), stored["tokens"], expanded=False)
    np.testing.assert_allclose(logits, stored["logits"], atol=TOLERANCE, rtol=0)

    config["rope_parameters"]["rope_theta"] = 1e6
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = one_shot_logits(load(tmp_path), stored["tokens"], expanded=False)
    assert np.abs(wrong - stored["logits"]).max() > 0.3, "these tokens do not tell theta apart"


@BOTH_FORMS
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 1e6, "num_attention_heads": 5, "v_head_dim": 96},
        {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_logits_equal_transformers_live(
    config: dict[str, Any], expanded: bool, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="needs the extra `parity`")
    write_random_checkpoint(tmp_path, dtype="F32", **TINY | {"seed": 3} | config)
    tokens = _tokens()
    expected = golden.transformers_logits(tmp_path, tokens)
    logits = one_shot_logits(load(tmp_path), tokens, expanded=expanded)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_a_checkpoint_saved_by_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers")
    write_random_checkpoint(tmp_path / "a", dtype="F32", **TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "rope_theta" not in saved
    assert saved["rope_parameters"]["rope_theta"] == 10_000
    tokens = _tokens()
    expected = golden.transformers_logits(tmp_path / "b", tokens)
    logits = one_shot_logits(load(tmp_path / "b"), tokens, expanded=False)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


# -- mlx-lm -------------------------------------------------------------------------------------


def _mlx_lm_logits(folder: Path, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    model, _ = load_mlx_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens)[None])[0])


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_files_that_mlx_lm_quantised_give_its_logits(bits: int, tmp_path: Path) -> None:
    config = TINY | {"qk_nope_head_dim": 64, "v_head_dim": 64, "dtype": "BF16"}
    write_random_checkpoint(tmp_path / "a", **config)
    convert(str(tmp_path / "a"), str(tmp_path / "b"), quantize=True, q_group_size=64, q_bits=bits)
    tokens = _tokens()
    model = load(tmp_path / "b")
    with_our_epsilon = reference_logits(model, tokens)
    for expanded in (True, False):
        ours = one_shot_logits(model, tokens, expanded=expanded)
        np.testing.assert_allclose(ours, with_our_epsilon, atol=TOLERANCE, rtol=0)
    # As it is, mlx-lm differs by its epsilon: by little, but by more than rounding.
    deviation = np.abs(ours - _mlx_lm_logits(tmp_path / "b", tokens)).max()
    assert 1e-5 < deviation < 0.05


@BOTH_FORMS
def test_bfloat16_errs_no_more_than_mlx_lm_does(expanded: bool, tmp_path: Path) -> None:
    config = TINY | {"qk_nope_head_dim": 64, "v_head_dim": 64}
    write_random_checkpoint(tmp_path / "a", **config)
    # Unquantised experts run in float32 alone on a CPU.
    convert(str(tmp_path / "a"), str(tmp_path / "b"), quantize=True, q_group_size=64, q_bits=8)
    exact = load(tmp_path / "b")
    rounded = load_model(tmp_path / "b", "bfloat16", lambda done, total: None)
    tokens = _tokens(300)
    expected = reference_logits(exact, tokens)
    ours = np.abs(one_shot_logits(rounded, tokens, expanded=expanded) - expected).mean()
    theirs = np.abs(reference_logits(rounded, tokens) - expected).mean()
    assert 0 < ours < 1.2 * theirs


@pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="only on a CPU are there limits"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_the_device_cannot_run_is_refused_at_start(dtype: Any, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, **TINY)
    with pytest.raises(SettingsError, match=f"float32 only, not in {dtype}"):
        load_model(tmp_path, dtype, lambda done, total: None)


def test_the_router_decides_in_float32(tmp_path: Path) -> None:
    model = tiny_model(n_routed_experts=16)
    mlp = model._model.layers[1].mlp
    x = mx.random.normal((2048, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    gate = mlp.gate

    def experts(gates: mx.array) -> npt.NDArray[np.int32]:
        chosen, _ = group_expert_select(gates, gate.e_score_correction_bias, 2, 1, 1, 1.8, True)
        return np.sort(np.array(chosen), axis=1)

    in_float32 = experts(x.astype(mx.float32) @ gate.weight.T)
    in_bfloat16 = experts(x @ gate.weight.T.astype(mx.bfloat16))
    differ = (in_float32 != in_bfloat16).any(axis=1)
    assert differ.sum() > 3, "these rows do not tell the two apart"
    y = np.array(MixtureOfExperts(mlp, pad_pairs=False)(x).astype(mx.float32))
    exact = np.array(mlp(x.astype(mx.float32)))
    deviation = np.abs(y - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert deviation[differ].max() < 0.03
