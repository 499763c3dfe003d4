"""Quantised KV beside 16 bit: KL divergence and top-1 of the logits, bytes, times, drafts.

    python benchmarks/kv_bits.py [MODEL] [--tokens N] [--context N] [--runs N]

MODEL is a folder; `middle` is the checkpoint of random weights with GLM-4.7-Flash's attention that
`glmd bench engine` uses. Texts are drawn from the model itself at temperature 1, so that its
distributions on them are those of serving. Times are medians of runs that alternate between the
settings. Drafts are those of greedy answers to the conversations of benchmarks/mtp.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from glmd.bench.random_checkpoint import middle_checkpoint
from glmd.checkpoint.hub import DEMO
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens
from glmd.kv_cache.stored_keys import KVBits
from glmd.kv_cache.tail_pool import TailPool
from glmd.llm import LLM
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel, load_model
from mtp import DOMAINS, conversations

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
    hidden, _ = model.forward(batch, TailPool(1, 1, model.dtype))
    logits = model.logits(hidden)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def times(model: LoadedModel, context: int, runs: int) -> dict[KVBits, tuple[float, float]]:
    """Seconds of a prompt, and of a decode step behind it."""
    prompts: dict[KVBits, list[float]] = {bits: [] for bits in SETTINGS}
    steps: dict[KVBits, list[float]] = {bits: [] for bits in SETTINGS}
    prompt = np.random.default_rng(0).integers(3, 250, context).tolist()
    for run in range(runs + 1):
        for bits in SETTINGS:
            engine = start(model, bits)
            engine.submit(request("0", prompt, STEPS))
            began = last = time.perf_counter()
            while engine.has_work:
                tokens = sum(len(output.tokens) for output in engine.step())
                now = time.perf_counter()
                if tokens and last == began:
                    first, last = now - began, now
                elif tokens:
                    if run:  # The first warms up.
                        steps[bits].append(now - last)
                    last = now
            if run:
                prompts[bits].append(first)
            engine.close()
    return {bits: (median(prompts[bits]), median(steps[bits])) for bits in SETTINGS}


def acceptance(folder: Path, bits: KVBits, prompts: int) -> str:
    """The share of accepted drafts, and their number; "–" without an MTP layer."""
    llm = LLM(folder, kv_bits=bits, mtp=1)
    try:
        if not llm.engine.info.has_mtp:
            return "–"
        for domain in DOMAINS:
            asked = list(conversations(domain, prompts))
            messages = [each["messages"] for each in asked]
            llm.chat_batch(messages, tools=asked[0]["tools"], temperature=0.0, max_tokens=200)
        stats = llm.engine.stats()
    finally:
        llm.close()
    return f"{stats.accepted / stats.drafted:.2%} of {stats.drafted:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO), help="default: the demo")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each text")
    parser.add_argument("--context", type=int, default=4096, help="tokens before timed steps")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each setting")
    parser.add_argument("--prompts", type=int, default=24, help="conversations per domain")
    options = parser.parse_args()
    folder = middle_checkpoint() if options.model == "middle" else Path(options.model)
    model = load_model(folder, "auto", lambda done, total: None, mtp=False)
    texts = draw(model, options.tokens)
    measured = times(model, options.context, options.runs)
    print("| bits | bytes per token | KL, nats | top-1 as with 16 | prompt | decode | accepted |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for bits in SETTINGS:
        divergences, agreed = [], []
        for text in texts:
            reference = log_probabilities(model, text, 16)
            other = log_probabilities(model, text, bits)
            divergences.append((mx.exp(reference) * (reference - other)).sum(-1))
            agreed.append(reference.argmax(-1) == other.argmax(-1))
        kl = mx.concatenate(divergences).mean().item()
        top = mx.concatenate(agreed).mean().item()
        prompt, step = (measured[bits][i] / measured[16][i] for i in (0, 1))
        ratios = f"{prompt:.2f} × | {step:.2f} ×"
        size, accepted = model.kv_bytes_per_token, acceptance(folder, bits, options.prompts)
        print(f"| {bits} | {size:,} | {kl:.2e} | {top:.2%} | {ratios} | {accepted} |", flush=True)


if __name__ == "__main__":
    main()
