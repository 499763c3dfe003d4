"""Checkpoints as people have them: each is served as it should be, or refused with the remedy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from file_variants import (
    BEGIN,
    CARD_LINES,
    END,
    PAGE,
    TOKENS,
    VARIANTS,
    Served,
    Variant,
    cast_arrays,
    change_arrays,
    describe,
    limit_tokenizer,
    outcomes,
    serve,
    table,
)
from mlx_lm.utils import load_model as load_mlx_lm

from glmd.api.generation_request import Defaults
from glmd.checkpoint.config import RECOMMENDED, ROLE_TAGS, load_config, sampling_defaults
from glmd.config import Settings
from glmd.convert.add_mtp import add_mtp
from glmd.convert.convert import convert
from glmd.convert.inspect import inspect
from glmd.convert.recipes import RECIPES
from glmd.errors import CheckpointError, GlmdError
from glmd.model.loader import load_model

Outcomes = dict[str, tuple[Variant, Path, Served | GlmdError]]

MIXED = RECIPES["mixed-8-5"]
USER = [{"role": "user", "content": "<|user|>?"}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return {each[0].id: each for each in outcomes(tmp_path_factory.mktemp("variants"))}


@pytest.fixture
def base(built: Outcomes) -> Path:
    return built["published"][1]


def served(built: Outcomes, id: str) -> Served:
    outcome = built[id][2]
    assert isinstance(outcome, Served), outcome
    return outcome


def test_the_docs_list_the_result_of_each(built: Outcomes) -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [describe(*each) for each in built.values()]
    assert shown == table(rows), "python tests/support/file_variants.py writes the table"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)
def test_what_is_served_has_the_logits_of_its_base(built: Outcomes, variant: Variant) -> None:
    _, folder, outcome = built[variant.id]
    if isinstance(outcome, GlmdError):
        assert "\n" not in outcome.message
        assert len(re.findall(r"model\.layers\.\S+", outcome.message)) <= 10
        return
    assert outcome.drafts == (outcome.stored.no_drafts is None)
    if variant.equal and variant.base is not None:
        assert (outcome.logits() == served(built, variant.base).logits()).all()
    else:
        assert np.abs(outcome.logits() - served(built, "published").logits()).max() < 20
    found = inspect(folder).stored
    assert found is not None
    assert found.no_drafts == outcome.stored.no_drafts
    # In float16 files the router's bias is float16 too.
    assert found.main_bytes == found.main_planned or variant.id == "float16"


def test_modes_of_quantisation_compute_what_mlx_lm_computes(built: Outcomes) -> None:
    for id in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        model, _ = load_mlx_lm(built[id][1])
        model.set_dtype(mx.float32)
        theirs = np.array(model(mx.array([TOKENS])))[0]
        assert np.abs(served(built, id).logits() - theirs).max() < 1e-3


def test_bits_of_a_quantised_kv_b_proj_are_those_that_serve_computes_with(built: Outcomes) -> None:
    model = served(built, "kv_b").model
    parts = {line.component: line.bits for line in inspect(built["kv_b"][1]).components}
    assert parts["attention"] == "8, bf16"
    assert model.bits_per_weight == pytest.approx(inspect(built["kv_b"][1]).main.bits_per_weight)


def test_truncation_and_padding_are_off(built: Outcomes, tmp_path: Path) -> None:
    text = "a much longer text than eight tokens"
    expected = served(built, "published").tokenizer.encode(text)
    assert served(built, "truncation").tokenizer.encode(text) == expected
    assert served(built, "truncation").tokenizer.encode("a") == [97]
    source = tmp_path / "in"
    shutil.copytree(built["published"][1], source)
    limit_tokenizer(source)
    convert(source, tmp_path / "out", MIXED)
    for key in ('"truncation": null', '"padding": null'):
        assert key in (tmp_path / "out" / "tokenizer.json").read_text()


def test_every_role_tag_ends_a_turn(built: Outcomes) -> None:
    tokenizer = served(built, "eos").tokenizer
    ends = served(built, "eos").model.eos_token_ids
    assert ends[0] == 256
    assert {tokenizer.controls[tag] for tag in ROLE_TAGS} < set(ends)
    assert tokenizer.controls["<|endoftext|>"] in ends


def test_a_temperature_alone_is_completed_by_the_model_card(built: Outcomes) -> None:
    sampling = sampling_defaults(built["temperature"][1])
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (1.0, 0.95, 0.01)
    assert sampling.top_k == 0


def test_the_cards_lines_are_defaults_that_a_request_overrides(
    built: Outcomes, tmp_path: Path
) -> None:
    tags = served(built, "card").tokenizer.special_tokens
    template = served(built, "card").template
    assert template.defaults == {"enable_thinking": True, "clear_thinking": False}
    assert template.ignored == ()
    assert template.render(USER)[-1] == tags.think
    assert template.render(USER, kwargs={"enable_thinking": False})[-1] == tags.end_think
    source = tmp_path / "in"
    shutil.copytree(built["published"][1], source)
    file = source / "chat_template.jinja"
    file.write_text(CARD_LINES.replace("= true", "= false") + file.read_text())
    convert(source, tmp_path / "out", MIXED)
    out = serve(tmp_path / "out").template
    assert out.render(USER)[-1] == out.render(USER, kwargs={"enable_thinking": True})[-1]
    text = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert text.count("set enable_thinking") == 1
    assert "enable_thinking is none -%}{%- set enable_thinking = false -%}" in text


def test_a_template_of_roles_writes_control_tokens_and_no_client_does(built: Outcomes) -> None:
    one = served(built, "by-role")
    pieces = one.template.render([*USER, {"role": "tool", "content": "x"}])
    tags = one.tokenizer.special_tokens
    ids = [piece for piece in pieces if isinstance(piece, int)][2:]
    assert ids == [tags.user, tags.observation, tags.assistant, tags.think]
    assert "<|user|>?" in pieces


def test_fused_experts_convert_to_the_same_files(built: Outcomes, tmp_path: Path) -> None:
    convert(built["fused"][1], tmp_path / "out", MIXED)
    for name in ("model.safetensors", "mtp.safetensors"):
        ours = (tmp_path / "out" / name).read_bytes()
        assert ours == (built["converted"][1] / name).read_bytes()


@pytest.mark.parametrize("id", ["fuse", "undescribed"])
def test_the_mtp_layer_is_added_to_files_that_lost_it(
    built: Outcomes, base: Path, tmp_path: Path, id: str
) -> None:
    shutil.copytree(built[id][1], tmp_path / "out")
    add_mtp(base, tmp_path / "out", MIXED)
    assert serve(tmp_path / "out").drafts
    with pytest.raises(CheckpointError, match="has an MTP layer already"):
        add_mtp(base, tmp_path / "out", MIXED)


def test_the_mtp_layer_is_added_to_float16_files(
    built: Outcomes, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(built["fuse"][1], tmp_path / "out")
    change_arrays(tmp_path / "out", lambda arrays: cast_arrays(arrays, mx.float16))
    add_mtp(base, tmp_path / "out", MIXED)
    assert load_config(tmp_path / "out").mtp is not None
    model = load_model(tmp_path / "out", "float16", lambda done, total: None)
    assert model.mtp is not None
    assert model.dtype == mx.float16


@pytest.mark.e2e
def test_a_server_says_that_it_serves_once_it_does(built: Outcomes) -> None:
    with _serve(built["temperature"][1]) as process:
        assert process.stdout is not None
        log = ""
        for line in process.stdout:
            log += line
            if "glmd serves" in line:
                break
        process.terminate()
    assert "temperature=1 (generation_config.json) top_p=0.95 (model card) top_k=0 (gen" in log
    assert "Chat page: http" in log.splitlines()[0]
    assert log.index("Engine ready") < log.index("glmd serves temperature-variant at http")


@pytest.mark.e2e
def test_a_server_that_cannot_serve_names_the_tensor(built: Outcomes) -> None:
    with _serve(built["zeros"][1]) as process:
        log = process.communicate()[0]
    assert process.returncode == 1
    assert "model.embed_tokens.weight is all zeros" in log
    assert "glmd serves" not in log


def _serve(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "glmd", "serve", str(folder), "--port", "0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_default_of_the_template_holds_unless_the_settings_set_one() -> None:
    template = {"enable_thinking": False, "clear_thinking": True}

    def thinks(**settings: bool) -> tuple[bool, bool]:
        defaults = Defaults.of(Settings.model_validate(settings), RECOMMENDED, None, template)
        return defaults.enable_thinking, defaults.clear_thinking

    assert thinks() == (False, True)
    assert thinks(enable_thinking=True) == (True, True)
    assert thinks(clear_thinking=False) == (False, False)
