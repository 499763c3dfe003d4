"""Serve GLM-4.7-Flash on this machine.

Library: `from glmd import LLM`; `load` and `generate` run the snippets of model cards.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from glmd.utils.mlx_environment import prepare_mlx

if TYPE_CHECKING:
    from glmd.llm import LLM, generate, load

__version__ = "0.2.0"

__all__ = ["LLM", "__version__", "generate", "load"]

_MODULES = {"LLM": "glmd.llm", "generate": "glmd.llm", "load": "glmd.llm"}


def __getattr__(name: str) -> Any:
    """Import the library on first use, because the API process must not load MLX."""
    if name in _MODULES:
        prepare_mlx()
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'glmd' has no attribute {name!r}")
