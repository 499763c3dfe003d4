"""The disk cache, in time and in tokens.

    python benchmarks/disk_cache.py [--part restart|gaps|conversations] [--tokens 20000]
        [--streams 4] [--conversations 100x4000]

With random weights of GLM-4.7-Flash's attention dimensions: the first token of a conversation after
a restart beside that of computing it; gaps of streams alone, beside a prompt whose KV is in memory,
and beside one that is restored. With the demo, since these numbers depend on no dimensions:
conversations in turn under memory for a tenth of them, with the tokens computed, the bytes written
and the most KV beside the least possible.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from glmd.bench.random_checkpoint import MIDDLE, on_gpu, write_random_checkpoint
from glmd.checkpoint.hub import DEMO
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine, load_engine
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens

VOCABULARY = 4096
DEMO_VOCABULARY = 400
"""Tokens from which the demo's conversations are drawn."""

BUDGET = 6 << 30
PARTS = ["restart", "gaps", "conversations"]


def start(folder: Path, cache: Path) -> Engine:
    config = EngineConfig(
        memory_budget=BUDGET, disk_cache=64 << 30, disk_cache_folder=str(cache), mtp=0
    )
    return load_engine(folder, config, lambda done, total: None)


def tokens(seed: int, count: int, vocabulary: int = VOCABULARY) -> list[int]:
    made: list[int] = np.random.default_rng(seed).integers(3, vocabulary, count).tolist()
    return made


def submit(engine: Engine, id: str, prompt: list[int], max_tokens: int) -> None:
    engine.submit(
        EngineRequest(
            id=id,
            prompt=pack_tokens(prompt),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=max_tokens,
            ignore_eos=True,
        )
    )


def first_token(engine: Engine, id: str, prompt: list[int]) -> float:
    """Seconds from the request to its first token; runs the engine until it is idle."""
    began, first = time.perf_counter(), 0.0
    submit(engine, id, prompt, 2)
    while engine.has_work:
        for output in engine.step():
            if output.tokens and not first:
                first = time.perf_counter() - began
    return first


def gaps(engine: Engine, streams: int, prompt: list[int] | None, steps: int) -> list[float]:
    """Seconds of the steps of `streams` streams, with a cached prompt among them or without."""
    for number in range(streams):
        submit(engine, f"stream {number}", tokens(100 + number, 64), 10_000)
    for _ in range(20):
        engine.step()
    if prompt is not None:
        submit(engine, "prompt", prompt, 1)
    measured = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        measured.append(time.perf_counter() - began)
    for number in range(streams):
        engine.cancel(f"stream {number}")
    engine.cancel("prompt")
    while engine.has_work:
        engine.step()
    return measured


def save(folder: Path, cache: Path, length: int) -> None:
    """Leave the prompt's KV on disk."""
    engine = start(folder, cache)
    first_token(engine, "a", tokens(1, length))
    engine.close()


def measure_restart(folder: Path, cache: Path, length: int) -> None:
    engine = start(folder, cache)
    first_token(engine, "warm", tokens(0, 600))
    computed = first_token(engine, "a", tokens(1, length))
    engine.close()
    engine = start(folder, cache)
    first_token(engine, "warm", tokens(2, 600))
    restored = first_token(engine, "a", tokens(1, length))
    print(
        f"first token of {length} tokens: computed {computed:.2f} s, restored {restored:.2f} s,"
        f" ratio {restored / computed:.3f}",
        flush=True,
    )
    engine.close()


def measure_streams(folder: Path, cache: Path, length: int, streams: int) -> None:
    """All sides alternate, each in engines of its own, and each time read from disk."""
    found: dict[str, list[float]] = {"alone": [], "in memory": [], "restored": []}
    prompt = tokens(1, length)
    for _ in range(3):
        for side, seconds in found.items():
            engine = start(folder, cache)
            if side == "in memory":
                first_token(engine, "before", prompt)
            seconds.extend(gaps(engine, streams, None if side == "alone" else prompt, 150))
            restored = engine.stats().disk_restored_tokens
            assert side == "alone" or restored >= length - 1, restored
            engine.close()
    p99 = {side: float(np.quantile(seconds, 0.99)) for side, seconds in found.items()}
    print(f"gaps of {streams} streams beside a prompt of {length} tokens, median and p99:")
    for side, seconds in found.items():
        middle, high, ratio = median(seconds), p99[side], p99[side] / p99["alone"]
        print(
            f"  {side}: {1e3 * middle:.1f} and {1e3 * high:.1f} ms, ratio {ratio:.2f}", flush=True
        )


def measure_conversations(cache: Path, count: int, length: int) -> None:
    engine = start(DEMO, cache)
    token_bytes = engine.info.kv_bytes_per_token
    engine.scheduler.kv_budget = (count // 10) * (length + 300) * token_bytes
    most = 0
    for turn in range(2):
        for number in range(count):
            prompt = tokens(1000 + number, length - 100 * (1 - turn), DEMO_VOCABULARY)
            submit(engine, f"{turn}.{number}", prompt, 1)
            while engine.has_work:
                engine.step()
                most = max(most, engine.scheduler.kv_bytes)
    stats = engine.stats()
    engine.close()
    disk = engine.scheduler.disk
    assert disk is not None
    written, least = disk.cache.written_bytes, count * length
    print(
        f"{count} conversations of {length} tokens in two turns, memory for a tenth: computed"
        f" {stats.prompt_tokens_computed / least:.3f} of the least possible, written"
        f" {written / (least * token_bytes):.3f} of the distinct bytes, KV at most"
        f" {most / stats.kv_budget_bytes:.3f} of its budget",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="all without this option")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--conversations", default="100x4000", help="COUNTxTOKENS")
    options = parser.parse_args()
    count, length = map(int, options.conversations.split("x"))
    parts = options.part or PARTS
    with tempfile.TemporaryDirectory(prefix="glmd-disk-") as name:
        folder = Path(name) / "model"
        changes = {"max_position_embeddings": 32_768, "vocab_size": VOCABULARY}
        write_random_checkpoint(folder, dtype="BF16" if on_gpu() else "F32", **MIDDLE | changes)
        cache = Path(name) / "kv"
        if "restart" in parts:
            measure_restart(folder, cache, options.tokens)
        if "gaps" in parts:
            if "restart" not in parts:
                save(folder, cache, options.tokens)
            measure_streams(folder, cache, options.tokens, options.streams)
        if "conversations" in parts:
            measure_conversations(Path(name) / "other", count, length)


if __name__ == "__main__":
    main()
