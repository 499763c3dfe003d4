"""Write the corpus of `glmd evaluate`: server/glmd/evaluate/corpus.jsonl.gz.

    python tools/corpus/build.py

Everything is generated from templates in this folder, with a fixed seed, except the long documents
and a part of the Python and JavaScript samples: these are the project's own pages and modules.
A quarter of the samples of each domain is for the calibration of recipes.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus_code import LANGUAGES, document, program
from corpus_dialogues import conversation
from corpus_maths import problem
from corpus_prose import PARAGRAPHS, prose

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "server" / "glmd" / "evaluate" / "corpus.jsonl.gz"
SEED = 20261127

PER_LANGUAGE = 44
CONVERSATIONS = 140
PROBLEMS = 90
LONG_CHARS = 24_000
ATTEMPTS = 100
"""Draws until a sample differs from all others of its domain."""

PAGES = (
    "docs/engine.md", "docs/caching.md", "docs/reliability.md", "docs/monitoring.md",
    "docs/structured-output.md", "docs/parameters.md", "docs/security.md", "docs/benchmarks.md",
    "docs/api.md", "docs/memory.md", "docs/clients.md", "demo/README.md",
)  # fmt: skip
MODULES = (
    "server/glmd/kv_cache/prefix_tree.py", "server/glmd/model/mla.py",
    "server/glmd/engine/core.py", "server/glmd/engine/scheduler/scheduler.py",
    "server/glmd/chat/glm4_parser.py", "server/glmd/checkpoint/weights.py",
    "server/glmd/structured_output/json_schema.py", "server/glmd/model/sampler.py",
)  # fmt: skip
SCRIPTS = ("chat.js", "server.js", "requests.js", "plot.js", "prose.js", "options.js")


def samples() -> Iterator[dict[str, Any]]:
    """Yield the samples of all domains."""
    for language in LANGUAGES:
        yield from _domain(f"code/{language}", PER_LANGUAGE, lambda rng, i, _, language=language: {
            "text": program(rng, language, i + i // 4)
        })  # fmt: skip
    yield from _domain("json", PER_LANGUAGE, lambda rng, i, _: {"text": document(rng, i + i // 4)})
    yield from _domain("tools", CONVERSATIONS, lambda rng, i, _: dict(
        zip(("messages", "tools"), conversation(rng, i + i // 4), strict=True)
    ))  # fmt: skip
    yield from _domain("maths", PROBLEMS, lambda rng, i, _: {"text": problem(rng, i + i // 4)})
    for language in PARAGRAPHS:
        yield from _domain(
            f"prose/{language}", PER_LANGUAGE, lambda rng, _, calibration, language=language: {
                "text": prose(rng, language, calibration=calibration)
            },
        )  # fmt: skip
    texts = [(ROOT / file).read_text("utf-8")[:LONG_CHARS] for file in (*PAGES, *MODULES)]
    yield from _domain("long", len(texts), lambda _rng, i, _: {"text": texts[i]})
    scripts = [
        (ROOT / "server/glmd/api/webui" / file).read_text("utf-8")[:3000] for file in SCRIPTS
    ]
    yield from _domain("code/javascript", len(scripts), lambda _rng, i, _: {"text": scripts[i]})


def _domain(domain: str, count: int, make: Any) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{SEED} {domain}")
    seen = set()
    for index in range(count):
        calibration = index % 4 == 3
        for _ in range(ATTEMPTS):
            made = make(rng, index, calibration)
            key = json.dumps(made, sort_keys=True)
            if key not in seen:
                break
        else:
            raise ValueError(f"{domain}: the templates have too few variants")
        seen.add(key)
        yield {"domain": domain, **({"split": "calibration"} if calibration else {}), **made}


def main() -> None:
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples()]
    data = ("\n".join(lines) + "\n").encode()
    OUT.write_bytes(gzip.compress(data, 9, mtime=0))
    print(f"{len(lines)} samples, {len(data):,} bytes, {OUT.stat().st_size:,} compressed")


if __name__ == "__main__":
    main()
