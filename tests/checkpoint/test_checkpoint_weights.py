"""Weight files are listed from their headers, and damage is found before any data is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.weights import (
    INDEX_NAME,
    TensorFileWriter,
    TensorSpec,
    check_specs,
    list_tensors,
    read_header,
)
from glmd.errors import CheckpointError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.uint16)
SPECS = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "U16", (4,))]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with TensorFileWriter(tmp_path / "x.safetensors", SPECS, {"format": "mlx"}) as writer:
        writer.write("a", A.tobytes())
        writer.write("b", B.data)
    return tmp_path / "x.safetensors"


def _rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a file and leave its data."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _message(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    assert "\n" not in error.value.message
    return error.value.message


def test_the_reference_library_reads_written_files(file: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = numpy.load_file(file)
    assert (arrays["a"] == A).all()
    assert (arrays["b"] == B).all()


def test_header_gives_names_shapes_and_places(file: Path) -> None:
    tensors = read_header(file)
    assert list(tensors) == ["a", "b"]
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes) == ("F32", (2, 3), 24)
    b = tensors["b"]
    assert file.read_bytes()[b.offset : b.offset + b.nbytes] == B.tobytes()


def test_headers_of_the_reference_library_are_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {"s": np.array(3, np.float32), "e": np.zeros((0, 4), np.int8), "x": A}
    numpy.save_file(arrays, tmp_path / "x.safetensors")
    assert {n: t.shape for n, t in read_header(tmp_path / "x.safetensors").items()} == {
        "s": (),
        "e": (0, 4),
        "x": (2, 3),
    }


def test_writer_refuses_other_tensors_than_planned(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="expected a of 24 bytes, got b of 8"),
        TensorFileWriter(tmp_path / "1", SPECS) as writer,
    ):
        writer.write("b", B.tobytes())
    with (
        pytest.raises(ValueError, match="b was never written"),
        TensorFileWriter(tmp_path / "2", SPECS) as writer,
    ):
        writer.write("a", A.tobytes())
    (tmp_path / "3").touch()
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "3", SPECS)


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_a_file_cut_in_its_header_is_named(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    message = _message(lambda: read_header(file))
    assert str(file) in message
    assert "truncated" in message


def test_a_file_cut_in_its_data_is_named_with_the_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    assert f"{file}: b is cut off: the file ends 3 bytes too soon" == _message(
        lambda: read_header(file)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: b"no json", "header is not JSON"),
        (lambda h: b"[]", "not a JSON object"),
        (lambda h: b'{"a": 1, "a": 2}', "a is twice in the header"),
        (lambda h: h.pop("b") and None, "8 bytes more than its header accounts for"),
        (lambda h: h["b"].update(shape=[5]), "b takes 8 bytes, but U16 [5] needs 10"),
        (lambda h: h["b"].update(dtype="X7"), "b has the unknown dtype X7"),
        (lambda h: h["b"].update(shape=[-4]), "b has the shape [-4]"),
        (lambda h: h["b"].update(data_offsets=[20, 28]), "b overlaps its neighbour"),
        (lambda h: h["b"].update(data_offsets=[28, 36]), "leaves a gap"),
        (lambda h: h["b"].pop("dtype") and None, "b has no valid dtype"),
        (lambda h: h.update(b=3), "b has no valid dtype"),
    ],
)
def test_a_damaged_header_is_named_with_file_and_tensor(
    file: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    _rewrite(file, change)
    message = _message(lambda: read_header(file))
    assert str(file) in message
    assert said in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=3)
    assert len(list_tensors(tmp_path)) == 135
    gone = tmp_path / "model-00002-of-00003.safetensors"
    gone.unlink()
    assert f"{gone}: missing" in _message(lambda: list_tensors(tmp_path))


def test_a_shard_without_a_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    message = _message(lambda: list_tensors(tmp_path))
    assert "model-00001-of-00002.safetensors: lm_head.weight is not in the file" in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..", "", "a\0", 3, ["a"]])
def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{json.dumps(name)} is not the name of a file" in _message(
        lambda: list_tensors(tmp_path)
    )


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model-copy.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    message = _message(lambda: list_tensors(tmp_path))
    assert "is in model-copy.safetensors already" in message


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    message = _message(lambda: list_tensors(tmp_path))
    assert "no model*.safetensors (only pytorch_model.bin, which glmd does not read)" in message


def test_tensors_are_compared_with_the_config(file: Path) -> None:
    tensors = read_header(file)

    def check(*specs: TensorSpec) -> str:
        return _message(lambda: check_specs(tensors, specs, folder=file.parent))

    a, b = SPECS
    check_specs(tensors, SPECS, folder=file.parent)
    check_specs(tensors, [TensorSpec("a", "BF16", (2, 3)), b], folder=file.parent)
    assert f"{file.parent}: c is missing" in check(a, b, TensorSpec("c", "F32", (1,)))
    assert f"{file}: b has the shape [4], but config.json requires [5]" in check(
        a, TensorSpec("b", "U16", (5,))
    )
    assert f"{file}: b does not belong to the model" in check(a)
    assert f"{file}: b is U16, not BF16 or F16 or F32" in check(a, TensorSpec("b", "BF16", (4,)))
