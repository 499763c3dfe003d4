"""Quantised KV beside 16 bit: KL divergence and top-1 of the logits, bytes, time of decode steps.

    python benchmarks/kv_bits.py [MODEL] [--tokens N] [--context N]

Texts are drawn from the model itself at temperature 1, so that its distributions on them are those
of serving. Times are medians over steps that take turns between the settings.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from glmd.checkpoint.hub import DEMO
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens
from glmd.kv_cache.stored_keys import KVBits
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel, load_model

SETTINGS: tuple[KVBits, ...] = (16, 8, 4)
SAMPLES = 4
STEPS = 40


def start(model: LoadedModel, bits: KVBits) -> Engine:
    return Engine(model, EngineConfig(kv_bits=bits, mtp=0), model.weight_bytes + (4 << 30))


def request(id: str, prompt: list[int], max_tokens: int) -> EngineRequest:
    return EngineRequest(
        id=id,
        prompt=pack_tokens(np.array(prompt, np.int32)),
        sampling=SamplingParams(temperature=1.0, seed=int(id)),
        max_tokens=max_tokens,
        ignore_eos=True,
    )


def draw(model: LoadedModel, tokens: int) -> list[list[int]]:
    """Texts of the model, each begun with a random token."""
    engine = start(model, 16)
    texts: dict[str, list[int]] = {}
    for index in range(SAMPLES):
        first = int(np.random.default_rng(index).integers(3, 250))
        texts[str(index)] = [first]
        engine.submit(request(str(index), [first], tokens))
    while engine.has_work:
        for output in engine.step():
            texts[output.id] += output.tokens
    return list(texts.values())


def log_probabilities(model: LoadedModel, tokens: list[int], bits: KVBits) -> mx.array:
    """[tokens, vocabulary], each token reading the KV of those before it as stored."""
    model.use_shape(replace(model.shape, kv_bits=bits))
    count = len(tokens)
    chunk = PrefillChunk(0, count, [], expanded=False, logits_rows=count)
    batch = ForwardBatch(mx.array(tokens), mx.arange(count), [], [chunk])
    hidden, _ = model.forward(batch, TailPool(0, 1, model.dtype))
    logits = model.logits(hidden)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def step_times(model: LoadedModel, context: int) -> dict[KVBits, tuple[float, float]]:
    """Seconds of a prompt, and of a decode step behind it."""
    times: dict[KVBits, tuple[float, float]] = {}
    prompt = np.random.default_rng(0).integers(3, 250, context).tolist()
    for bits in SETTINGS:
        engine = start(model, bits)
        engine.submit(request("0", prompt, STEPS))
        seconds: list[float] = []
        began = time.perf_counter()
        first = 0.0
        while engine.has_work:
            before = time.perf_counter()
            tokens = sum(len(output.tokens) for output in engine.step())
            if tokens and not first:
                first = time.perf_counter() - began
            elif tokens:
                seconds.append(time.perf_counter() - before)
        times[bits] = first, median(seconds)
        engine.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each text")
    parser.add_argument("--context", type=int, default=4096, help="tokens before timed steps")
    options = parser.parse_args()
    model = load_model(options.model, "auto", lambda done, total: None, mtp=False)
    texts = draw(model, options.tokens)
    times = step_times(model, options.context)
    print("| bits | bytes per token | KL, nats | top-1 as with 16 | prompt | decode step |")
    print("|---:|---:|---:|---:|---:|---:|")
    for bits in SETTINGS:
        divergences, agreed = [], []
        for text in texts:
            reference = log_probabilities(model, text, 16)
            other = log_probabilities(model, text, bits)
            divergences.append((mx.exp(reference) * (reference - other)).sum(-1))
            agreed.append(reference.argmax(-1) == other.argmax(-1))
        kl = mx.concatenate(divergences).mean().item()
        top = mx.concatenate(agreed).mean().item()
        prompt, step = (times[bits][i] / times[16][i] for i in (0, 1))
        size = model.kv_bytes_per_token
        print(f"| {bits} | {size:,} | {kl:.2e} | {top:.2%} | {prompt:.2f} × | {step:.2f} × |")


if __name__ == "__main__":
    main()
