"""Default sampling parameters: from generation_config.json, or recommended values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from glmd.checkpoint.config import read_json_object
from glmd.errors import CheckpointError
from glmd.ipc import SamplingParams

FILE_NAME = "generation_config.json"

RECOMMENDED = SamplingParams(temperature=0.2, top_k=50, top_p=0.95, min_p=0.01)
"""From the model card of the mixed 8/5-bit GLM-4.7-Flash, which also recommends no repeat penalty
(https://huggingface.co/leonsarmiento/GLM-4.7-Flash-5bit-mlx)."""

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The keys of generation_config.json that glmd uses."""


class _Sampling(msgspec.Struct):
    """The sampling fields of transformers' `GenerationConfig`; null means absent."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_defaults(folder: Path) -> SamplingParams:
    """The sampling parameters of requests that set none.

    Read from generation_config.json: parameters that it leaves out are off, and
    `do_sample: false` means greedy. Without the file, or without any sampling field in it,
    `RECOMMENDED`.

    Raises:
        CheckpointError: the file is malformed, or a value has the wrong type or is out of range.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return RECOMMENDED
    try:
        fields = msgspec.convert(read_json_object(file), _Sampling)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from None
    values = {key: getattr(fields, key) for key in SAMPLING_FIELDS}
    given = {key: value for key, value in values.items() if value is not None}
    _check_ranges(file, given)
    if fields.do_sample is False:
        return SamplingParams(temperature=0.0)
    return SamplingParams(**given) if given else RECOMMENDED


def recommended_fields() -> dict[str, Any]:
    """`RECOMMENDED` as entries of a generation_config.json."""
    return {"do_sample": True} | {
        key: getattr(RECOMMENDED, key) for key in SAMPLING_FIELDS if key != "repetition_penalty"
    }


def _check_ranges(file: Path, given: dict[str, float]) -> None:
    def refuse(key: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {key} is {given[key]}, but must be {allowed}", file=str(file)
        )

    for key in ("temperature", "top_k"):
        if not given.get(key, 0) >= 0:  # Also refuses NaN.
            raise refuse(key, "at least 0")
    for key in ("top_p", "min_p"):
        if not 0 <= given.get(key, 0) <= 1:
            raise refuse(key, "from 0 to 1")
    if given.get("repetition_penalty", 1) <= 0:
        raise refuse("repetition_penalty", "above 0")
