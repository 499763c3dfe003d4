"""Rank 0 of a group of ranks, beside an engine with the whole model: both must answer the same.

A program, since a process can join the collectives of one group only:

    python rank_scenarios.py CHECKPOINT RANKS [briefly]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmd.utils.mlx_environment import prepare_mlx

prepare_mlx()  # As in the processes of the other ranks, whose sums must be equal to the bit.

import numpy as np
import numpy.typing as npt
from engines import Answer, Run, assert_idle, request
from grammars import TAGS

from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine, load_engine
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.ipc import GrammarSpec, PromptLogprobs
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import OutputSpec, Regex

PLANS = [
    *[DraftPlan(0)] * 3,
    *[DraftPlan(1, with_gaps=True, screens=True)] * 3,
    *[DraftPlan(1)] * 4,
    *[DraftPlan(2, with_gaps=True)] * 3,
]
"""What the MTP layer does, again and again: its KV is deferred, screened, caught up, and used."""

Outcome = dict[str, Any]


def open_engine(folder: Path, ranks: int, **config: Any) -> Engine:
    settings = EngineConfig(
        ranks=ranks,
        dtype="float32",
        memory_budget=1 << 30,
        max_step_tokens=64,
        rank_timeout=60.0,  # Other tests may keep the machine busy.
        **config,
    )
    engine = load_engine(folder, settings, lambda done, total: None)
    plans = itertools.cycle(PLANS)
    engine._draft_controller.choose = lambda sequences: next(plans)  # type: ignore[method-assign]
    return engine


def tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 250, count)]


def serve(engine: Engine) -> Outcome:
    """Answers to requests of all kinds, by name."""
    run = Run(engine)
    grammar = build_grammar(OutputSpec(Regex("[a-c]{2}( [0-9]+,){3}", "p")), TAGS).text
    shared = tokens(1, 150)
    run.submit(
        request("greedy", shared, max_tokens=12, ignore_eos=True),
        request("sampled", tokens(2, 9), max_tokens=12, temperature=1.0, seed=3, ignore_eos=True),
        request("penalised", tokens(3, 30), max_tokens=8, repetition_penalty=1.3, logprobs=3),
        request("grammar", tokens(4, 12), max_tokens=12, grammar=GrammarSpec(grammar=grammar)),
        request("cancelled", tokens(5, 40), max_tokens=500, ignore_eos=True),
        request("many", [*shared[:100], 7, 8], max_tokens=4, n=2, temperature=1.0, seed=1),
        request("scored", tokens(6, 80), max_tokens=2, prompt_logprobs=5),
    )
    scores: list[PromptLogprobs] = []
    while engine.has_work:
        for output in run.step():
            scores += output.prompt_logprobs or []
            if output.id == "cancelled" and len(run.answer("cancelled").tokens) >= 5:
                engine.cancel("cancelled")
    found = _answers(run)
    # A prefix that is cached, and one that forks off another.
    again = Run(engine)
    extended = [*shared, *run.answer("greedy").tokens]
    again.submit(
        request("hit", extended, max_tokens=6, ignore_eos=True),
        request("fork", [*shared[:90], *tokens(7, 30)], max_tokens=6, ignore_eos=True),
    )
    again.finish()
    found |= _answers(again)
    found["cached"] = [again.answer(name).cached_tokens for name in ("hit", "fork")]
    # Memory becomes too little for all.
    tight = Run(engine)
    names = [f"tight {i}" for i in range(3)]
    tight.submit(
        *(
            request(n, tokens(20 + i, 40), max_tokens=30, ignore_eos=True)
            for i, n in enumerate(names)
        )
    )
    while not all((name, 0) in tight.answers and tight.answer(name).tokens for name in names):
        tight.step()
    budget = engine.scheduler.kv_budget
    engine.scheduler.kv_budget = 160 * engine.info.kv_bytes_per_token
    tight.finish()
    engine.scheduler.kv_budget = budget
    found |= _answers(tight)
    assert engine.stats().preemptions
    assert engine.stats().evicted_tokens
    assert_idle(engine)
    found["scores"] = _values(scores)
    return found


def _values(scores: list[PromptLogprobs]) -> npt.NDArray[np.float64]:
    entries = [entry for part in scores for entry in part.tokens]
    return np.array([[entry.logprob, *entry.top_logprobs] for entry in entries])


def _answers(run: Run) -> Outcome:
    def outcome(answer: Answer) -> list[int]:
        return answer.tokens if answer.finish != "cancelled" else answer.tokens[:5]

    return {f"{id} {index}": outcome(answer) for (id, index), answer in run.answers.items()}


def compare(folder: Path, ranks: int, scenario: Callable[[Engine], Outcome], **config: Any) -> None:
    """Assert that a group answers as an engine with the whole model."""
    whole = open_engine(folder, 1, **config)
    expected = scenario(whole)
    whole.close()
    group = open_engine(folder, ranks, **config)
    found = scenario(group)
    group.close()
    difference = np.abs(found.pop("scores") - expected.pop("scores")).max()
    assert difference < 1e-3, difference
    for name, value in expected.items():
        assert found[name] == value, (name, found[name], value)


def serve_briefly(engine: Engine) -> Outcome:
    """An answer of one request, and the log-probabilities of its prompt."""
    run = Run(engine)
    run.submit(request("scored", tokens(6, 60), max_tokens=4, prompt_logprobs=5, ignore_eos=True))
    scores: list[PromptLogprobs] = []
    while engine.has_work:
        for output in run.step():
            scores += output.prompt_logprobs or []
    return _answers(run) | {"scores": _values(scores)}


if __name__ == "__main__":
    chosen = serve_briefly if sys.argv[3:] == ["briefly"] else serve
    compare(Path(sys.argv[1]), int(sys.argv[2]), chosen, kv_bits=16)
