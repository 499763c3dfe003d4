"""The random checkpoints that every other test stands on."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from glmd.bench.random_checkpoint import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    to_bf16,
    write_random_checkpoint,
)
from glmd.checkpoint.layout import main_weights, mtp_weights
from glmd.checkpoint.weights import list_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _digests(folder: Path) -> dict[str, str]:
    out = {}
    for name, tensor in list_tensors(folder).items():
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def test_holds_exactly_the_tensors_of_the_published_layout(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path / "a")
    weights = chain(main_weights(config), mtp_weights(config))
    expected = {source: each.source_shape for each in weights for source in each.sources}
    stored = list_tensors(tmp_path / "a")
    assert {name: tensor.shape for name, tensor in stored.items()} == expected
    assert "model.layers.3.eh_proj.weight" in expected
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in expected


def test_equal_seeds_give_equal_weights_however_they_are_sharded(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "a", seed=3)
    write_random_checkpoint(tmp_path / "b", seed=3, shards=3)
    write_random_checkpoint(tmp_path / "c", seed=4)
    assert len(list((tmp_path / "b").glob("model-*-of-00003.safetensors"))) == 3
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b") != _digests(tmp_path / "c")


def test_mtp_vocabulary_is_shared_or_not_as_asked(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "a")
    write_random_checkpoint(tmp_path / "b", mtp_shares_vocabulary=False)
    pair = ("model.layers.3.shared_head.head.weight", "lm_head.weight")
    shared, own = _digests(tmp_path / "a"), _digests(tmp_path / "b")
    assert shared[pair[0]] == shared[pair[1]]
    assert own[pair[0]] != own[pair[1]]


def test_transformers_loads_it_whole_and_its_activations_stay_sane(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, num_nextn_predict_layers=0, dtype="F32")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.rope_parameters["rope_theta"] == 10_000
    with torch.no_grad():
        out = model(torch.arange(3, 99)[None], output_hidden_states=True)
    assert all(0.3 < state.std() < 5 for state in out.hidden_states)
    best = out.logits[0].sort(-1, descending=True).values
    assert (best[:, 0] - best[:, 1]).median() > 0.2


def test_tokenizer_round_trips_any_text_and_knows_the_tags(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve 漢字 🙂\n\t\0 end"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for tag in SPECIAL_TOKENS + ADDED_TOKENS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) == 1
    ids = tokenizer.encode("<|user|>a<think>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


def test_bf16_rounding_is_that_of_torch() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    values[:3] = [1 + 2**-8, 1 + 3 * 2**-8, 0]  # two ties
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert (to_bf16(values) == expected.view(np.uint16)).all()
