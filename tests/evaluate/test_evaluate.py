"""`glmd evaluate`: streaming passes, their statistics, and the corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import typer
from engines import TINY, load, one_shot_logits
from paths import ROOT, TESTS
from typer.testing import CliRunner

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.layout import main_weights
from glmd.cli.evaluate import evaluate as command
from glmd.convert.convert import convert
from glmd.convert.recipes import find_recipe
from glmd.errors import CheckpointError
from glmd.evaluate import drafts, layer_pass, model_pass, sensitivity, variants
from glmd.evaluate.corpus import CORPUS, Sample, TokenSet, read_corpus, tokenize
from glmd.evaluate.layer_pass import LayerReader
from glmd.evaluate.model_pass import Candidate, Pass
from glmd.evaluate.run import evaluate
from glmd.evaluate.scores import mean_and_error
from glmd.kv_cache.stored_keys import KVBits
from glmd.model.mla import SCORE_BYTES

DEMO = ROOT / "demo" / "glm-4.7-flash-demo"

SAMPLES = [
    Sample(domain="prose", text="What is the capital of France? It is a city on a river. " * 8),
    Sample(
        domain="tools",
        messages=[
            {"role": "user", "content": "Weather in Lyon?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Look it up.",
                "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Lyon"}}}],
            },
        ],
    ),
    Sample(domain="prose", text="Four words are enough."),
]


def silent(name: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def text() -> TokenSet:
    return tokenize(SAMPLES, DEMO)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "4"
    convert(DEMO, out, find_recipe("uniform-4"))
    return out


def plain_logits(folder: Path, text: TokenSet, kv_bits: KVBits = 16) -> np.ndarray[Any, Any]:
    """Log-probabilities of the plain forward pass, [tokens, vocabulary]."""
    model = load(folder)
    model.use_shape(replace(model.shape, kv_bits=kv_bits))
    parts = [
        one_shot_logits(model, text.tokens[start:end], expanded=end - start > 100)
        for start, end in zip(text.starts[:-1], text.starts[1:], strict=True)
    ]
    logits = np.concatenate(parts).astype(np.float64)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.parametrize("layout", ["huggingface", "mlx", "quantized", "kv 4"])
def test_streaming_equals_the_plain_forward_pass(
    layout: str, text: TokenSet, quantized: Path, tmp_path: Path
) -> None:
    folder = {"mlx": tmp_path / "mlx", "quantized": quantized}.get(layout, DEMO)
    kv_bits: KVBits = 4 if layout == "kv 4" else 16
    if layout == "mlx":
        convert(DEMO, folder, find_recipe("bf16"))
    candidate = Candidate("demo", folder, kv_bits)
    scores = Pass(candidate, text, mx.float32, tmp_path / "work", rows=100).run(silent)
    expected = plain_logits(folder, text, kv_bits)
    nll = -expected[text.scored, text.successors[text.scored]]
    np.testing.assert_allclose(scores.nll, nll, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(scores.top, expected[text.scored].argmax(-1))
    assert scores.accepted is not None
    assert 0.2 < np.nanmean(scores.accepted) < 1


@pytest.mark.parametrize("kept", [64, 2048])
def test_kl_is_exact_within_its_bound(
    kept: int, text: TokenSet, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_pass, "TOP_K", kept)
    base = Pass(Candidate("demo", DEMO), text, mx.float32, tmp_path)
    base.run(silent)
    scores = Pass(Candidate("4", quantized), text, mx.float32, tmp_path, reference=base).run(silent)
    p, q = plain_logits(DEMO, text), plain_logits(quantized, text)
    exact = (np.exp(p) * (p - q)).sum(-1)[text.scored]
    assert scores.kl is not None
    assert scores.kl_bound is not None
    assert exact.mean() > 1e-3
    assert (scores.kl <= exact + 1e-4).all()
    assert (exact <= scores.kl + scores.kl_bound + 1e-4).all()
    if kept == 2048:
        assert not scores.kl_bound.any()
    else:
        assert scores.kl.mean() > 0.8 * exact.mean()


def test_an_interrupted_pass_goes_on_behind_the_last_layer(
    text: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    layer = layer_pass.LayerReader.layer

    def recorded(self: layer_pass.LayerReader, index: int) -> Any:
        read.append(index)
        return layer(self, index)

    monkeypatch.setattr(layer_pass.LayerReader, "layer", recorded)

    def interrupt(name: str, done: int, total: int) -> None:
        if done > 3 * len(text):  # in the third layer
            raise KeyboardInterrupt

    expected = Pass(Candidate("demo", DEMO), text, mx.float32, tmp_path / "whole").run(silent)
    assert read == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        Pass(Candidate("demo", DEMO), text, mx.float32, tmp_path / "work").run(interrupt)
    read.clear()
    again = Pass(Candidate("demo", DEMO), text, mx.float32, tmp_path / "work")
    scores = again.run(silent)
    assert read == [2, 3]
    np.testing.assert_array_equal(scores.nll, expected.nll)
    read.clear()
    np.testing.assert_array_equal(
        Pass(Candidate("demo", DEMO), text, mx.float32, tmp_path / "work").run(silent).nll,
        expected.nll,
    )
    assert not read
    assert not list(again.folder.glob("h*.bin")), "hidden states are kept"


def memory_bound(config: ModelConfig, itemsize: int, longest: int, *, mtp: bool = True) -> int:
    """Bound of MLX's memory in bytes during a pass.

    Args:
        itemsize: bytes of an unquantised weight in memory.
        longest: tokens of the longest sample.
        mtp: the MTP layer runs beside its embedding, its head and the main model's head.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    # Stacking holds one projection of the experts twice, fusing the MTP layer's two.
    layer = (5 if mtp else 4) * config.n_routed_experts * hidden * width
    layer += 3 * hidden * max(width * config.n_shared_experts, config.intermediate_size)
    heads = config.num_attention_heads
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    layer += hidden * (config.q_lora_rank + config.kv_lora_rank + heads * config.v_head_dim)
    layer += heads * head * (config.q_lora_rank + config.kv_lora_rank)
    vocabulary = config.vocab_size * hidden
    last = (3 * vocabulary + layer if mtp else vocabulary) * itemsize + logits_bytes(config)
    working = working_bytes(config, max(layer_pass.BATCH_ROWS, longest))
    return working + max(layer * itemsize, last)


def working_bytes(config: ModelConfig, rows: int) -> int:
    """Bytes of a layer's intermediate results."""
    heads, width = config.num_attention_heads, config.moe_intermediate_size
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    hidden = config.hidden_size
    per_row = 8 * hidden + config.num_experts_per_tok * (3 * hidden + 4 * width) + 4 * heads * head
    return rows * per_row * 4 + 4 * SCORE_BYTES + layer_pass.CACHE_BYTES


def logits_bytes(config: ModelConfig) -> int:
    return 8 * layer_pass.LOGITS_ROWS * config.vocab_size * 4


def search_bound(config: ModelConfig, itemsize: int, longest: int) -> int:
    """Bound of MLX's memory in bytes during a search.

    A layer is there as stored, in float32 as quantised, and as modules; of the head, so are those
    of the six whole models that are measured together. Stacking holds one projection of the
    experts twice.
    """
    stages: dict[str, int] = {}
    for weight in main_weights(config):
        stage = ".".join(weight.path.split(".")[:3])
        stages[stage] = stages.get(stage, 0) + prod(weight.shape)
    projection = config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
    layer = max(stages.values()) * (2 + 4 + itemsize) + projection * 2
    head = config.vocab_size * config.hidden_size * (2 + 4 + 7 * itemsize) + logits_bytes(config)
    working = working_bytes(config, max(variants.ROWS, longest))
    return max(layer + working, head + layer_pass.CACHE_BYTES)


def peak_memory(step: Callable[[], object]) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def tokens_of(count: int, sample: int) -> TokenSet:
    tokens = np.random.default_rng(0).integers(0, 256, count).astype(np.int32)
    return TokenSet(tokens, np.arange(0, count + 1, sample), ("a",) * (count // sample))


def test_memory_does_not_depend_on_layers_or_tokens(tmp_path: Path) -> None:
    config = TINY | {"n_routed_experts": 64, "moe_intermediate_size": 128}
    peaks = []
    for name, layers, count in (("few", 2, 1500), ("many", 6, 3000)):
        folder = tmp_path / name
        parsed = write_random_checkpoint(folder, **config | {"num_hidden_layers": layers})
        one = Pass(Candidate(name, folder), tokens_of(count, 100), mx.float32, tmp_path / "work")
        peaks.append(peak_memory(partial(one.run, silent)))
        assert peaks[-1] < memory_bound(parsed, 4, 100)
    assert peaks[1] < 1.2 * peaks[0]


def test_memory_of_a_search_does_not_depend_on_layers_or_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its first step, which runs all components."""
    monkeypatch.setattr(sensitivity, "OPTIONS", sensitivity.PROBES)
    for module, name in ((variants, "ROWS"), (drafts, "BATCH_ROWS")):
        monkeypatch.setattr(module, name, 40)
    config = TINY | {"n_routed_experts": 4, "moe_intermediate_size": 512}
    config |= {"num_nextn_predict_layers": 1}
    peaks = []
    for name, layers, count in (("few", 2, 40), ("many", 6, 80)):
        folder = tmp_path / name
        parsed = write_random_checkpoint(folder, **config | {"num_hidden_layers": layers})
        reader = LayerReader(folder, mx.float32)
        step = partial(
            sensitivity.measure, reader, tokens_of(count, 20), tmp_path / f"work {name}",
            bands=1, on_progress=lambda done, total: None,
        )  # fmt: skip
        peaks.append(peak_memory(step))
        assert peaks[-1] < search_bound(parsed, 4, 100)
    assert peaks[1] < 1.2 * peaks[0]


def test_published_model_is_evaluated_and_searched_in_8_gb() -> None:
    config = load_config(TESTS / "fixtures" / "glm-4.7-flash")
    assert memory_bound(config, 2, 4096) < 8e9
    assert memory_bound(config, 4, 4096, mtp=False) < 8e9  # the noise floor
    assert search_bound(config, 2, 1024) < 8e9


def test_rows_name_llama_perplexitys_statistics(
    text: TokenSet, quantized: Path, tmp_path: Path
) -> None:
    rows = evaluate(
        [Candidate("4", quantized)], Candidate("demo", DEMO), text,
        work=tmp_path, on_progress=silent, contexts=(0, 50), kv_bits=(4,),
    )  # fmt: skip
    whole = [row for row in rows if "domains" in row]
    reference, floor, reference_kv, model, model_kv = whole
    assert [row["kv_bits"] for row in whole] == [16, 16, 4, 16, 4]
    assert [row["model"] for row in whole[2:]] == ["demo, 4-bit KV", "4", "4, 4-bit KV"]
    assert 0 < reference_kv["mean_kl"] < model["mean_kl"] < model_kv["mean_kl"]
    assert list(model)[:9] == [
        "model", "bits_per_weight", "mean_kl", "kl_99", "same_top", "ppl", "ppl_ratio",
        "expert_overlap", "tokens",
    ]  # fmt: skip
    assert (reference["mean_kl"], reference["same_top"], reference["ppl_ratio"]) == (0, 1, 1)
    assert 0 < floor["mean_kl"] < model["mean_kl"] / 5
    assert floor["expert_overlap"] > model["expert_overlap"] > 0.5
    assert model["median_kl"] < model["kl_90"] < model["kl_99"] <= model["kl_999"]
    assert model["ppl_ratio"] == pytest.approx(model["ppl"] / reference["ppl"])
    assert model["dp_percentiles"]["min"] < model["dp_percentiles"]["max"]
    assert set(model["domains"]) == {"prose", "tools"}
    assert [part["layer"] for part in model["layers"]] == [0, 1, 2, 3]
    assert model["layers"][0]["expert_overlap"] is None
    assert 0 < model["layers"][3]["residual_error"] < 1
    near, far = (row for row in rows if row["model"].startswith("4, context"))
    assert near["tokens"] + far["tokens"] == model["tokens"] == len(text.scored)


def test_standard_error_counts_clusters() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(400), 25)
    independent = rng.normal(size=10_000)
    _, error = mean_and_error(independent, clusters)
    assert error == pytest.approx(0.01, rel=0.1)
    _, error = mean_and_error(rng.normal(size=400)[clusters], clusters)
    assert error == pytest.approx(0.05, rel=0.1)


def test_models_of_another_shape_are_refused(text: TokenSet, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "other", **TINY)
    with pytest.raises(CheckpointError, match="vocab_size is 512, but 2048"):
        evaluate(
            [Candidate("other", tmp_path / "other")], Candidate("demo", DEMO), text,
            work=tmp_path, on_progress=silent,
        )  # fmt: skip


def test_command_prints_a_table_and_writes_json(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("A short text about nothing in particular.\n" * 5)
    app = typer.Typer()
    app.command()(command)
    arguments = (
        quantized, "--against", "demo", "--text", tmp_path / "notes.md",
        "--json", tmp_path / "out.json", "--work", tmp_path / "work",
    )  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "notes.md" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["model"] == "demo (reference)"
    assert rows[-1]["mean_kl"] > 0


# -- corpus -------------------------------------------------------------------------------------


def test_corpus_has_the_composition_that_the_docs_state() -> None:
    assert CORPUS.stat().st_size < 1_000_000
    test, calibration = read_corpus("test"), read_corpus("calibration")
    assert 600 <= len(test) + len(calibration) <= 1000
    page = (ROOT / "docs" / "quality.md").read_text()
    counts = Counter(sample.domain for sample in test), Counter(s.domain for s in calibration)
    for domain in counts[0]:
        assert f"| {domain} | {counts[0][domain]} | {counts[1][domain]} |" in page
    texts = {sample.text for sample in test if sample.text}
    assert texts.isdisjoint(sample.text for sample in calibration)


def test_every_sample_renders_with_the_demos_template() -> None:
    tools = [sample for sample in read_corpus("test") if sample.messages]
    text = tokenize(tools, DEMO)
    assert text.domains == ("tools",) * len(tools)
    assert len(text) > 50_000
