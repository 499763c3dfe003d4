"""glmd serves GLM-4.7-Flash on the machine under your desk.

As a library: `from glmd import LLM`, and `load` and `generate` for snippets from model cards.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmd.llm import LLM
    from glmd.mlx_lm_compat import generate, load

__version__ = "0.1.0"

__all__ = ["LLM", "__version__", "generate", "load"]

_HOMES = {"LLM": "glmd.llm", "generate": "glmd.mlx_lm_compat", "load": "glmd.mlx_lm_compat"}


def __getattr__(name: str) -> Any:
    """Import the library on first use: the API process must not load MLX for a version number."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'glmd' has no attribute {name!r}")
