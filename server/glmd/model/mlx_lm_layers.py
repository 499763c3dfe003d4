"""mlx-lm's layer definitions, imported without mlx-lm's own `__init__`.

`mlx_lm/__init__.py` imports its tokenizers and generation loop, and with them transformers: most of
the CPU time of an engine's start, and 50 MB. The layer definitions need only MLX. So this module
puts a package into `sys.modules` under the name `mlx_lm` whose `__init__` runs when a name is first
read from the package. Submodules import as usual, and other code in the process that imports
mlx_lm, before or after, gets the complete package with the same submodules.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package whose `__init__` runs on the first read of a name that is not a submodule."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__: ModuleSpec = spec
        self.__file__ = spec.origin
        self.__loader__ = spec.loader
        self.__package__ = spec.name
        self.__path__ = spec.submodule_search_locations or []
        self._init_lock = threading.RLock()
        self._init_started = False

    def __getattr__(self, name: str) -> Any:
        # Tools that walk over sys.modules ask every module for names like `__wrapped__`.
        is_tool = name.startswith("__") and name not in ("__all__", "__version__")
        if is_tool or self.__spec__.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._init_lock:
            # Reads by the `__init__` itself find what is defined so far, as in any package.
            if not self._init_started:
                self._init_started = True
                try:
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self._init_started = False
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
            return ModuleType.__getattribute__(self, name)

    def __dir__(self) -> list[str]:
        _ = self.__all__
        return dir(self)


def _import_lazily(name: str) -> None:
    """Put a package into `sys.modules` without running its `__init__`, unless it is there."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.modules[name] = _LazyPackage(spec)


_import_lazily("mlx_lm")

from mlx_lm.models.glm4_moe_lite import (  # noqa: E402
    Glm4MoeLiteDecoderLayer,
    Glm4MoeLiteMoE,
    Model,
    ModelArgs,
    group_expert_select,
)
from mlx_lm.models.switch_layers import SwitchLinear  # noqa: E402

__all__ = [
    "Glm4MoeLiteDecoderLayer",
    "Glm4MoeLiteMoE",
    "Model",
    "ModelArgs",
    "SwitchLinear",
    "group_expert_select",
]
