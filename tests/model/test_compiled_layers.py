"""Layers are traced once for each number of rows, not for contexts that grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import TINY, load, request, run, tiny_engine

from glmd.bench.random_checkpoint import write_random_checkpoint


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that `mx.compile` has traced, once per trace."""
    names: list[str] = []
    compile = mx.compile

    def counting(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def trace(*arrays: Any) -> Any:
            names.append(function.__name__)
            return function(*arrays)

        return compile(trace, *args, **kwargs)

    monkeypatch.setattr(mx, "compile", counting)
    return names


def test_growing_contexts_and_tails_are_not_traced_again(traced: list[str], tmp_path: Path) -> None:
    # Loaded here: the layers of a model that tests share may be compiled already.
    write_random_checkpoint(tmp_path, dtype="F32", **TINY | {"max_position_embeddings": 700})
    model = load(tmp_path)
    engine = tiny_engine(model)
    layers, rows = model.args.num_hidden_layers, 3

    def generate(first: int) -> None:
        prompts = [np.random.default_rng(first + i).integers(3, 500, 70) for i in range(rows)]
        # Longer than a tail: 128 tokens are sealed meanwhile.
        asked = [
            request(str(first + i), prompt.tolist(), max_tokens=200, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        run(engine, *asked)

    generate(0)
    counts = {name: traced.count(name) for name in set(traced)}
    # One for each number of decoding rows; prompts of 70 tokens take more rows than are compiled.
    assert counts.keys() <= {"pre_attention", "post_attention", "compute_kv"}
    assert max(counts.values()) <= layers * (rows + 2)
    generate(10)
    assert len(traced) == sum(counts.values())
