"""Start a rank other than rank 0: `python -m glmd.engine.ranks`."""

from __future__ import annotations

import sys

from glmd.utils.mlx_environment import prepare_mlx


def run() -> int:
    prepare_mlx()
    from glmd.engine.ranks.worker import main  # noqa: PLC0415  # It loads MLX.

    return main()


if __name__ == "__main__":
    sys.exit(run())
