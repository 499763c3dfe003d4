"""Conversion that cannot succeed: one clear line, the source untouched, nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.weights import TensorFileWriter, TensorSpec, list_tensors
from glmd.convert.add_mtp import add_mtp
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES
from glmd.errors import CheckpointError

MIXED = RECIPES["mixed-8-5"]
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "in"
    write_random_checkpoint(folder, shards=2)
    return folder


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "in")
    return tmp_path / "in"


def _content(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def _refusal(source: Path, out: Path) -> CheckpointError:
    """The error of a conversion, having checked that it left no trace."""
    before, beside = _content(source), sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        convert(source, out, MIXED)
    assert "\n" not in error.value.message
    assert _content(source) == before
    assert sorted(out.parent.iterdir()) == beside
    return error.value


def _patch(file: Path, tensor: str, data: bytes) -> None:
    """Overwrite the first bytes of a stored tensor."""
    stored = list_tensors(file.parent)[tensor]
    with stored.file.open("r+b") as stream:
        stream.seek(stored.offset)
        stream.write(data)


def _change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# A source that is not what it should be


def test_another_kind_of_model_is_named(source: Path, tmp_path: Path) -> None:
    _change_config(source, model_type="deepseek_v3")
    error = _refusal(source, tmp_path / "out")
    assert 'model_type is "deepseek_v3"' in error.message
    assert "glm4_moe_lite" in error.message
    assert error.file == str(source / "config.json")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "config.json: no such file" in _refusal(tmp_path / "in", tmp_path / "out").message


def test_a_missing_shard_is_named(source: Path, tmp_path: Path) -> None:
    (source / SECOND).unlink()
    assert f"{SECOND}: missing" in _refusal(source, tmp_path / "out").message


def test_a_cut_shard_is_named_with_its_tensor(source: Path, tmp_path: Path) -> None:
    file = source / SECOND
    file.write_bytes(file.read_bytes()[:-100])
    error = _refusal(source, tmp_path / "out")
    assert error.file == str(file)
    assert error.message.startswith(f"{file}: {error.tensor} is cut off: the file ends 100 bytes")


@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\x7f"])
def test_a_tensor_that_holds_no_numbers_is_named(source: Path, tmp_path: Path, bits: bytes) -> None:
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    _patch(source / SECOND, name, bits)  # NaN, infinity
    error = _refusal(source, tmp_path / "out")
    assert f"{name} holds infinities or NaN" in error.message
    assert error.tensor == name
    assert error.file == str(list_tensors(source)[name].file)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"kv_lora_rank": 128}, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        ({"vocab_size": 1024}, "model.embed_tokens.weight"),
        ({"moe_intermediate_size": 128}, "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_wrong_shapes_are_named_with_file_and_tensor(
    source: Path, tmp_path: Path, change: dict[str, Any], tensor: str
) -> None:
    _change_config(source, **change)
    error = _refusal(source, tmp_path / "out")
    assert f"{tensor} has the shape" in error.message
    assert "config.json requires" in error.message
    assert error.tensor == tensor
    assert error.file is not None
    assert error.file.endswith(".safetensors")


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    _change_config(source, num_hidden_layers=5)
    error = _refusal(source, tmp_path / "out")
    assert error.message == f"{source}: model.layers.4.input_layernorm.weight is missing"
    assert error.tensor == "model.layers.4.input_layernorm.weight"


def test_layers_that_config_json_does_not_count_are_named(source: Path, tmp_path: Path) -> None:
    _change_config(source, num_hidden_layers=2)
    message = _refusal(source, tmp_path / "out").message
    assert "model.layers.2.input_layernorm.weight does not belong to the model" in message


def test_a_foreign_tensor_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "model-adapter.safetensors"
    with TensorFileWriter(file, [TensorSpec("lora_A", "BF16", (1,))]) as writer:
        writer.write("lora_A", b"\0\0")
    message = _refusal(tmp_path / "in", tmp_path / "out").message
    assert message == f"{file}: lora_A does not belong to the model that config.json describes"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_other_damaged_files_are_named(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).write_text("{")
    assert f"{source / name}: not valid JSON" in _refusal(source, tmp_path / "out").message


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"I16" '))
    message = _refusal(tmp_path / "in", tmp_path / "out").message
    assert "model.embed_tokens.weight is I16, not BF16 or F16 or F32" in message


def test_a_converted_checkpoint_is_refused_as_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "mlx", MIXED)
    message = _refusal(tmp_path / "mlx", tmp_path / "out").message
    assert "is quantised already" in message
    convert(source, tmp_path / "plain", RECIPES["bf16"])
    assert "in MLX's layout already" in _refusal(tmp_path / "plain", tmp_path / "out").message


def test_a_shard_that_is_truncated_during_conversion_is_named(source: Path, tmp_path: Path) -> None:
    def cut(done: int, total: int) -> None:
        os.truncate(source / SECOND, 5000)

    with pytest.raises(
        CheckpointError, match=f"{SECOND}: .* cannot be read: the file is truncated"
    ):
        convert(source, tmp_path / "out", MIXED, progress=cut)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


# An output that cannot be written


def test_an_existing_out_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert _refusal(source, out).message == f"{out} exists already."
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    assert _refusal(source, out).message == f"{out} exists already."


def test_an_out_inside_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    assert "must not change" in _refusal(source, source / "out").message
    (tmp_path / "link").symlink_to(source)
    assert "must not change" in _refusal(source, tmp_path / "link" / "out").message


def test_too_little_disk_space_is_reported_before_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = _refusal(source, tmp_path / "out").message
    assert "0.00125 GB are needed, but only 0.001 GB are free" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only on Linux, which has /dev/full")
def test_a_disk_that_fills_up_during_conversion_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def open_full(path: Any, flags: int, *mode: int, **kwargs: Any) -> int:
        new = flags & os.O_EXCL and str(path).endswith(".safetensors")
        return real("/dev/full", os.O_WRONLY) if new else real(path, flags, *mode, **kwargs)

    monkeypatch.setattr(os, "open", open_full)
    error = _refusal(source, tmp_path / "out")
    assert "the disk is full" in error.message
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENOSPC


def test_a_write_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """A real limit on file sizes, met in the middle of a shard."""
    done = _run(source, tmp_path / "out", limit=500_000)
    assert done.returncode == 1
    assert f"{tmp_path / 'out'} cannot be written: File too large." in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_folder_that_must_not_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(source, out, MIXED)


# Interruption

_SCRIPT = """
import os, sys
from pathlib import Path
from glmd.errors import GlmdError
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES

source, out, kill_after, signal = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
count = 0

def progress(done, total):
    global count
    count += 1
    if count == kill_after:
        os.kill(os.getpid(), signal)

try:
    convert(source, out, RECIPES["mixed-8-5"], progress=progress)
except GlmdError as error:
    sys.exit(error.message)
"""


def _run(
    source: Path, out: Path, *, kill_after: int = 0, by: int = 0, limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(source), str(out), str(kill_after), str(int(by))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kill_after", [1, 40, 74])
def test_a_killed_run_leaves_no_out_and_the_next_one_starts_clean(
    source: Path, tmp_path: Path, kill_after: int
) -> None:
    before = _content(source)
    done = _run(source, tmp_path / "out", kill_after=kill_after, by=signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL  # 74 is the last weight: only the rename is missing
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.glmd-partial", "in"]

    convert(source, tmp_path / "out", MIXED)
    convert(source, tmp_path / "again", MIXED)
    assert _content(tmp_path / "out") == _content(tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "in", "out"]
    assert _content(source) == before


def test_ctrl_c_leaves_nothing_at_all(source: Path, tmp_path: Path) -> None:
    done = _run(source, tmp_path / "out", kill_after=20, by=signal.SIGINT)
    assert "KeyboardInterrupt" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_two_runs_cannot_write_one_folder(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.glmd-partial"
    partial.mkdir()
    (partial / "theirs").touch()
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "is being written by another glmd" in _refusal(source, tmp_path / "out").message
    assert (partial / "theirs").exists()
    os.close(fd)
    convert(source, tmp_path / "out", MIXED)


def test_a_failed_addition_of_the_mtp_layer_leaves_the_folder_as_it_was(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", MIXED, mtp=False)
    before = _content(tmp_path / "out")
    _patch(source / SECOND, "model.layers.3.eh_proj.weight", b"\xc0\x7f")
    with pytest.raises(CheckpointError, match=r"eh_proj\.weight holds infinities or NaN"):
        add_mtp(source, tmp_path / "out", MIXED)
    assert _content(tmp_path / "out") == before
