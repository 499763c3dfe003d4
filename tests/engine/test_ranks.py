"""A model divided among ranks, which are processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from engines import tiny_model
from paths import TESTS

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.engine.config import EngineConfig
from glmd.engine.ranks import plan
from glmd.engine.ranks.hosts import Hosts
from glmd.engine.ranks.worker import RankDisagreesError, Replay
from glmd.errors import SettingsError


@pytest.mark.parametrize("scenario", [("2",), ("4", "briefly")])
def test_ranks_answer_as_the_whole_model(scenario: tuple[str, ...], tmp_path: Path) -> None:
    """Of log-probabilities, sampling, grammars, drafts, prefixes, preemption and eviction."""
    folder = tmp_path / "model"
    write_random_checkpoint(
        folder,
        dtype="F32",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=20,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    program = TESTS / "support" / "rank_scenarios.py"
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *scenario],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"disk_cache": 1 << 30}, "disk_cache"),
        ({"mla_kernel": "on"}, "mla_kernel"),
        ({"experts_kernel": "on"}, "experts_kernel"),
    ],
)
def test_what_ranks_cannot_do_is_refused(config: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=f"^{named}: not with ranks"):
        EngineConfig(ranks=2, **config)  # type: ignore[arg-type]


def test_hosts_are_those_of_mlx_launch(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]')
    assert Hosts.of(str(file)) == Hosts(["10.0.0.1", "10.0.0.2"])
    file.write_text(
        '{"backend": "jaccl", "hosts": ['
        '{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [null, "rdma_en2"]},'
        '{"ssh": "b", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", null]}]}'
    )
    assert Hosts.of(str(file)).rdma == [[None, "rdma_en2"], ["rdma_en2", None]]
    for text in ("[]", "{}", '[{"ssh": "a", "ips": ["10.0.0.1"]}]', "nonsense"):
        file.write_text(text)
        with pytest.raises(SettingsError, match=r"^ranks: .*hosts\.json"):
            Hosts.of(str(file))


def test_a_rank_with_other_kv_than_rank_0_stops() -> None:
    replay = Replay(tiny_model(), mx.distributed.init())
    setup = plan.Setup(score_bytes=1 << 20, expanded_bytes=1 << 20, kv_bits=16, deferred_width=None)
    chunk = plan.Chunk(start=0, end=3, spans=[], expanded=False, logits_rows=1)
    forward = plan.Forward(rows=3, layouts=[], chunks=[chunk], deferred=False)
    replay.run(plan.Plan(1, [setup, forward]))
    digest = replay.executor.digest(1)
    assert digest is not None
    replay.run(plan.Plan(2, [], digest_step=1, digest=digest))
    with pytest.raises(RankDisagreesError, match=r"^step 1 has the digest"):
        replay.run(plan.Plan(3, [], digest_step=1, digest=digest + 1))
