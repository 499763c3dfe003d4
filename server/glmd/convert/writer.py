"""Writing the weights of a plan, one at a time, and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from glmd.checkpoint.weights import INDEX_NAME, TensorFileWriter
from glmd.convert.plan import Plan, PlannedWeight, total
from glmd.convert.weights import WeightReader, bounded_cache, encode

Progress = Callable[[int, int], None]
"""Called after each weight with the bytes written so far, and in all."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        plan: its arrays.
        notes: what the user should know, a sentence each.
    """

    plan: Plan
    notes: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """Counts the bytes written and tells `progress`."""

    progress: Progress | None
    total: int
    done: int = 0

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def write_weights(
    file: Path, weights: Sequence[PlannedWeight], reader: WeightReader, report: Report
) -> None:
    """Write one safetensors file, weight after weight.

    Raises:
        CheckpointError: a weight cannot be read.
        OSError: the file cannot be written.
    """
    specs = [spec for planned in weights for spec in planned.specs]
    with bounded_cache(), TensorFileWriter(file, specs, {"format": "mlx"}) as writer:
        for planned in weights:
            for name, data in encode(planned, reader.read(planned.weight)):
                writer.write(name, data)
            report.advance(planned.nbytes)


def shard_names(
    parts: Sequence[tuple[PlannedWeight, ...]],
) -> list[tuple[str, tuple[PlannedWeight, ...]]]:
    """Name the files of the main model as Hugging Face and mlx-lm do."""
    if len(parts) == 1:
        return [("model.safetensors", parts[0])]
    count = len(parts)
    return [
        (f"model-{number:05d}-of-{count:05d}.safetensors", part)
        for number, part in enumerate(parts, start=1)
    ]


def write_index(folder: Path, parts: Sequence[tuple[PlannedWeight, ...]]) -> None:
    """Write model.safetensors.index.json: which file holds which tensor, and how much it all is."""
    main = total(chain(*parts), "")
    weight_map = {
        spec.name: file
        for file, part in shard_names(parts)
        for planned in part
        for spec in planned.specs
    }
    metadata = {"total_size": main.nbytes, "total_parameters": main.parameters}
    write_json(
        folder / INDEX_NAME,
        {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write `value` as people read JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
