"""Parts of checkpoints for tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import load_config
from glmd.checkpoint.hub import DEMO
from glmd.checkpoint.shard import check_ranks, shard_weights
from glmd.checkpoint.stored import StoredWeights, read_weights
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES
from glmd.errors import SettingsError
from glmd.model.loader import read_arrays


def stored_in(folder: Path) -> StoredWeights:
    return read_weights(folder, load_config(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout, with twenty heads as GLM-4.7-Flash."""
    folder = tmp_path_factory.mktemp("published") / "model"
    write_random_checkpoint(
        folder,
        num_attention_heads=20,
        num_hidden_layers=2,
        intermediate_size=512,
        moe_intermediate_size=256,
    )
    return folder


@pytest.mark.parametrize("layout", ["published", "quantised"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_make_up_the_whole(layout: str, ranks: int, folder: Path, tmp_path: Path) -> None:
    if layout == "quantised":
        convert(folder, tmp_path / "mixed", RECIPES["mixed-8-5"])
        folder = tmp_path / "mixed"
    stored = stored_in(folder)
    shards = [shard_weights(stored, rank, ranks) for rank in range(ranks)]
    assert shards[0].config.num_attention_heads == 20 // ranks
    parts = [read_arrays(shard.main | shard.mtp) for shard in shards]  # type: ignore[operator]
    divided = 0
    for name, whole in read_arrays({**stored.main, **stored.mtp}).items():
        one = parts[0][name]
        axes = [axis for axis, size in enumerate(one.shape) if size != whole.shape[axis]]
        joined = mx.concatenate([part[name] for part in parts], axis=axes[0]) if axes else one
        assert np.array_equal(np.array(joined.view(mx.uint8)), np.array(whole.view(mx.uint8))), name
        divided += whole.nbytes if axes else 0
    # Embedding and head, which are whole, are most of a model as small as this.
    assert divided > 0.5 * sum(tensor.nbytes for tensor in stored.main.values())
    loaded = sum(tensor.nbytes for tensor in shards[0].main.values())
    assert sum(array.nbytes for name, array in parts[0].items() if name in shards[0].main) == loaded


@pytest.mark.parametrize("ranks", [3, 8])
def test_numbers_that_do_not_divide_the_heads_are_refused(ranks: int, folder: Path) -> None:
    message = rf"^ranks: 20 attention heads cannot be divided among {ranks} ranks\. Use 2 or 4\.$"
    with pytest.raises(SettingsError, match=message):
        check_ranks(stored_in(folder), ranks)


def test_groups_of_quantised_weights_stay_whole() -> None:
    message = r"^ranks: .*down_proj is quantised in 1 groups along its inputs.* with one rank\.$"
    with pytest.raises(SettingsError, match=message):
        check_ranks(stored_in(DEMO), 2)
