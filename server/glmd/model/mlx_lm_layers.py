"""mlx-lm's layer definitions, imported without mlx-lm's own `__init__`.

`mlx_lm/__init__.py` imports its tokenizers and generation loop, and with them transformers: most of
the CPU time of an engine's start, and 200 MB. The layer definitions need only MLX.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_init(package: str) -> Iterator[None]:
    """Import submodules of a package in the context, without its `__init__`.

    The submodules are private copies: afterwards `sys.modules` has no trace of them, so that other
    code in the process imports the complete package. A package that is imported already is used.
    """
    if package in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
            del sys.modules[name]


with _without_init("mlx_lm"):
    from mlx_lm.models.glm4_moe_lite import (
        Glm4MoeLiteDecoderLayer,
        Glm4MoeLiteMoE,
        Model,
        ModelArgs,
        group_expert_select,
    )
    from mlx_lm.models.switch_layers import SwitchLinear

__all__ = [
    "Glm4MoeLiteDecoderLayer",
    "Glm4MoeLiteMoE",
    "Model",
    "ModelArgs",
    "SwitchLinear",
    "group_expert_select",
]
