"""Try the MLA kernel on this machine, and print the times: `python tools/mla_kernel.py`."""

from __future__ import annotations

import logging
import sys

import mlx.core as mx

from glmd.engine.kernel_trial import kernel_is_used
from glmd.model.mla import MLAShape

GLM_4_7_FLASH = MLAShape(heads=20, latent=512, nope=192, rope=64, value=256)


def main() -> int:
    """Return 0 if the kernel is right, whether or not it is fast."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for dtype in (mx.bfloat16, mx.float16):
        print(dtype)
        kernel_is_used("on", GLM_4_7_FLASH, dtype)
        kernel_is_used("auto", GLM_4_7_FLASH, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
