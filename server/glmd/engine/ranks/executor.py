"""An executor whose model is divided among ranks, in any of them.

Collectives must come in the same order on all ranks, or they would exchange each other's data. The
layers' sums follow one another by their data; whatever else is shared is made to wait for what came
before.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadata, AttentionMetadataBuilder
from glmd.engine.executor import Choose, DraftInputs, Executor
from glmd.kv_cache.stored_keys import StoredKeys, arrays_of
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.loader import LoadedModel

KEPT_DIGESTS = 4
"""Steps whose digests are kept. Rank 0 sends that of the step before the last."""


class RankExecutor(Executor):
    """Runs one rank's part of the model.

    Attributes:
        steps: number of forward passes.
        collectives, collective_bytes: number of sums, and bytes of their inputs on each rank.
    """

    def __init__(
        self,
        model: LoadedModel,
        tails: TailPool,
        builder: AttentionMetadataBuilder,
        group: mx.distributed.Group,
    ) -> None:
        super().__init__(model, tails, builder)
        self.steps = 0
        self.collectives = 0
        self.collective_bytes = 0
        self._group = group
        self._after: list[mx.array] = []
        """Results of the latest collective."""
        self._digests: dict[int, mx.array] = {}

    def share(self, values: mx.array) -> mx.array:
        """Values [n] int32 of rank 0, on all ranks. Those of other ranks only have the shape."""
        own = values if self._group.rank() == 0 else mx.zeros_like(values)
        if self._after:
            own = mx.depends(own, self._after)
        shared = mx.distributed.all_sum(own, group=self._group)
        self._after = [shared]
        self.collectives += 1
        self.collective_bytes += shared.nbytes
        return shared

    def share_rows(self, *columns: mx.array) -> list[mx.array]:
        """`share` of several arrays of equal length."""
        return list(mx.split(self.share(mx.concatenate(list(columns))), len(columns)))

    def digest(self, step: int) -> int | None:
        """Digest of the KV that a step computed and of tails; None: it is not kept.

        Sums over ranks are equal to the bit on all of them, and so is what follows from them.
        """
        digest = self._digests.get(step)
        return None if digest is None else int(np.array(digest))

    def forward(
        self, batch: ForwardBatch, layouts: list[AttentionMetadata]
    ) -> tuple[mx.array, list[StoredKeys]]:
        hidden, caches = super().forward(batch, layouts)
        last = arrays_of(caches[-1])[0]
        digest = last.view(mx.uint32).sum()
        if self.tails.slots:
            # KV that differs would change the sums, but on all ranks.
            digest = digest + arrays_of(self.tails.view(0))[0].view(mx.uint32).sum()
        self.steps += 1
        self._digests[self.steps] = digest
        self._digests.pop(self.steps - KEPT_DIGESTS, None)
        # Two sums in each layer; in the last one, of rows with logits only.
        others, sampled = 2 * (self._model.args.num_hidden_layers - 1), hidden.shape[0]
        self._count(others, batch.tokens.shape[0])
        self._count(2 if sampled else 0, sampled)
        self._submit([hidden, last], digest)
        return hidden, caches

    def compute_kv(self, successors: mx.array, hidden: mx.array, batch: ForwardBatch) -> StoredKeys:
        return super().compute_kv(self.share(successors), hidden, batch)

    def draft(self, inputs: DraftInputs, choose: Choose) -> list[mx.array]:
        last, tokens, positions = self.share_rows(inputs.last, inputs.tokens, inputs.positions)
        left = inputs.count

        def choose_and_share(h: mx.array, behind: mx.array) -> mx.array:
            nonlocal left
            left -= 1
            self._count(2, h.shape[0])
            self._submit([h])
            chosen = choose(h, behind)
            return self.share(chosen) if left else chosen

        shared = replace(inputs, last=last, tokens=tokens, positions=positions)
        return super().draft(shared, choose_and_share)

    def _submit(self, results: list[mx.array], *others: mx.array) -> None:
        """Start what ends with the latest collective."""
        self._after = results
        mx.async_eval(*results, *others)

    def _count(self, sums: int, rows: int) -> None:
        self.collectives += sums
        width = self._model.args.hidden_size * self._model.dtype.size
        self.collective_bytes += sums * rows * width
