"""The layer definitions are imported without mlx-lm's `__init__`, which stays usable."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

LOAD_DEMO = """
import sys
import glmd.engine.main
from glmd.engine.core import EngineConfig, load_engine
from pathlib import Path
import glmd
demo = Path(glmd.__file__).parent / "demo"
engine = load_engine(demo, EngineConfig(), lambda done, total: None)
heavy = {"transformers", "torch", "tokenizers", "huggingface_hub", "fastapi"}
print(sorted(heavy & set(sys.modules)))
"""

USE_PACKAGE = """
import mlx_lm.models.cache
from mlx_lm import generate, load
from mlx_lm.utils import load_model
assert mlx_lm.load is load and mlx_lm.__version__ and "generate" in dir(mlx_lm)
assert mlx_lm.utils.load_model is load_model
assert mlx_lm.models.glm4_moe_lite.Model is layers.Model
assert not hasattr(mlx_lm, "no_such_name")
"""

IMPORT_LAYERS = "from glmd.model import mlx_lm_layers as layers"


def run_python(code: str) -> str:
    """Run code in a new process; returns the last line of stdout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def test_engine_process_loads_the_demo_without_transformers() -> None:
    assert run_python(LOAD_DEMO) == "[]"


@pytest.mark.parametrize(
    "code",
    [
        f"{IMPORT_LAYERS}\n{USE_PACKAGE}",
        f"import mlx_lm\n{IMPORT_LAYERS}\n{USE_PACKAGE}",
        f"{IMPORT_LAYERS}\nfrom mlx_lm import *\nload\n{USE_PACKAGE}",
        f"{IMPORT_LAYERS}\nimport mlx_lm.utils\n{USE_PACKAGE}",
    ],
    ids=["after", "before", "star", "submodule"],
)
def test_mlx_lm_is_complete_for_other_code_in_the_process(code: str) -> None:
    run_python(code)


def test_layers_alone_do_not_run_the_packages_init() -> None:
    code = (
        "import sys, inspect; inspect.getmodule(layers.Model); print('mlx_lm.utils' in sys.modules)"
    )
    assert run_python(f"{IMPORT_LAYERS}\n{code}") == "False"


def test_init_that_failed_runs_again_on_the_next_read() -> None:
    code = f"""
import sys
{IMPORT_LAYERS}
import mlx_lm
sys.modules["transformers"] = None
try:
    mlx_lm.load
except ImportError:
    del sys.modules["transformers"]
    print(callable(mlx_lm.load))
"""
    assert run_python(code) == "True"
