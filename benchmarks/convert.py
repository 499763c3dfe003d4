"""Measure memory and time of converting the full-size model.

    python benchmarks/convert.py [--layers N] [--recipe mixed-8-5] [--dir FOLDER]

Writes a checkpoint of the published shape as sparse files (62 GB that take no space: real headers,
and zeros for data), converts it, and prints peak resident memory, throughput and sizes. If the disk
cannot hold the output, fewer layers are converted. All files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.layout import Weight, main_weights, mtp_weights
from glmd.checkpoint.weights import INDEX_NAME, TensorSpec, header_bytes
from glmd.convert.convert import convert
from glmd.convert.recipes import DEFAULT_RECIPE, RECIPES, Recipe, plan_recipe, total

CONFIG = Path(__file__).parents[1] / "tests" / "fixtures" / "glm-4.7-flash" / "config.json"

SHARD = 1_300_000_000
"""Bytes in one file of the source, as in the published checkpoint's 48."""

SPARE = 2_000_000_000
"""Bytes of disk to leave free."""


def main() -> None:
    options = _options()
    recipe = RECIPES[options.recipe]
    with tempfile.TemporaryDirectory(prefix="glmd-bench-", dir=options.dir) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free - SPARE
        config = write_sparse_checkpoint(folder / "source", options.layers)
        while output_bytes(config, recipe) > free:
            shutil.rmtree(folder / "source")
            config = write_sparse_checkpoint(folder / "source", config.num_hidden_layers - 1)
        source = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        print(f"{config.num_hidden_layers} layers and MTP, {source / 1e9:.2f} GB of source")
        start = time.perf_counter()
        done = convert(folder / "source", folder / "out", recipe, progress=_show)
        seconds = time.perf_counter() - start
    written = total(done.plan.main, "main model")
    whole = total(plan_recipe(config, RECIPES["bf16"], mtp=False).main, "in BF16")
    print(
        f"\n{recipe.name}: main model {written.nbytes:,} bytes, {written.bits_per_weight:.3f} bits"
        f" per weight, {whole.nbytes / written.nbytes:.2f} times smaller than in BF16"
    )
    print(
        f"peak resident memory {_peak() / 1e9:.2f} GB, {seconds:.0f} s,"
        f" {source / seconds / 1e9:.2f} GB of source per second, on {platform.machine()}"
    )


def write_sparse_checkpoint(folder: Path, layers: int) -> ModelConfig:
    """Write a checkpoint of the published shape with `layers` layers as sparse files.

    The MTP layer has its own copy of the vocabulary, as published.
    """
    folder.mkdir()
    raw = json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    config = load_config(folder)
    weight_map: dict[str, str] = {}
    shards = list(_shards(chain(main_weights(config), mtp_weights(config))))
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = header_bytes(specs, {"format": "pt"})
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.nbytes for spec in specs))
        weight_map |= {spec.name: name for spec in specs}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return config


def output_bytes(config: ModelConfig, recipe: Recipe) -> int:
    plan = plan_recipe(config, recipe, mtp=True)
    return total(plan.all).nbytes


def _shards(weights: Iterable[Weight]) -> Iterator[list[TensorSpec]]:
    specs = {
        name: TensorSpec(name, "F32" if weight.keeps_float32 else "BF16", weight.source_shape)
        for weight in weights
        for name in weight.sources
    }
    shard: list[TensorSpec] = []
    filled = 0
    for spec in specs.values():
        if shard and filled + spec.nbytes > SHARD:
            yield shard
            shard, filled = [], 0
        shard.append(spec)
        filled += spec.nbytes
    yield shard


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=load_config(CONFIG).num_hidden_layers)
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT_RECIPE)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def _show(done: int, total: int) -> None:
    print(f"\r{done / total:.0%}, peak {_peak() / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)


def _peak() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


if __name__ == "__main__":
    main()
