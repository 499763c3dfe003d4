"""/v1/models, the log and each usage show whether a server drafts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from live import CHECKPOINT, live_server

from glmd.bench.random_checkpoint import write_random_checkpoint


@pytest.mark.parametrize("layers", [0, 1])
def test_models_log_and_usage_show_whether_there_are_drafts(
    tmp_path: Path, layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_random_checkpoint(tmp_path, num_nextn_predict_layers=layers)
    shutil.copy(CHECKPOINT / "chat_template.jinja", tmp_path)
    config = {"mtp": 1}
    with (
        caplog.at_level(logging.INFO, "glmd"),
        live_server(folder=tmp_path, engine="glmd.engine.core", config=config) as live,
        live.client() as http,
    ):
        assert http.get("/v1/models").json()["data"][0]["has_mtp"] is bool(layers)
        body = {"prompt": "abc", "max_tokens": 30, "ignore_eos": True, "temperature": 2, "seed": 1}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        details = usage["completion_tokens_details"]
        accepted = details["accepted_prediction_tokens"]
        rejected = details["rejected_prediction_tokens"]
        if layers:
            assert accepted + rejected >= (usage["completion_tokens"] - 2) // 2
            assert accepted < usage["completion_tokens"]
        else:
            assert accepted == rejected == 0
    ready = next(line for line in caplog.messages if line.startswith("Engine ready:"))
    assert ("mtp=no" in ready) is not bool(layers)
