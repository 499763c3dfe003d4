"""Try the experts' kernels on this machine, and print the times: `python tools/experts_kernel.py`.

The layers have GLM-4.7-Flash's matrices, but fewer experts, so that they fit on a small machine.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES
from glmd.engine.experts_trial import find_fused_rows
from glmd.model.loader import load_model

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 4,
    "n_routed_experts": 16,
    "num_nextn_predict_layers": 0,
}


def main() -> int:
    """Return 0 if the kernels are right, whether or not they are fast."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        published = Path(folder) / "published"
        write_random_checkpoint(published, **SIZES)
        for recipe in ("mixed-8-5", "mixed-8-4"):
            converted = Path(folder) / recipe
            convert(published, converted, RECIPES[recipe])
            model = load_model(converted, "auto", lambda done, total: None)
            print(recipe)
            find_fused_rows("on", model)
            find_fused_rows("auto", model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
