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
import mlx_lm.models.glm4_moe_lite
from mlx_lm import generate, load
from mlx_lm.utils import load_model
assert mlx_lm.load is load and mlx_lm.__version__
assert mlx_lm.utils.load_model is load_model
assert callable(generate) and mlx_lm.generate is generate
assert mlx_lm.models.glm4_moe_lite.Model and mlx_lm.models.base and mlx_lm.models.switch_layers
assert layers.Model.__name__ == "Model"
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
        f"{IMPORT_LAYERS}\nimport mlx_lm.generate\n{USE_PACKAGE}",
    ],
    ids=["after", "before", "star", "submodule"],
)
def test_mlx_lm_is_complete_for_other_code_in_the_process(code: str) -> None:
    run_python(code)


def test_layers_leave_no_part_of_mlx_lm_in_sys_modules() -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith('mlx_lm')])"
    assert run_python(f"{IMPORT_LAYERS}\n{code}") == "[]"
