"""Forward pass with one layer in memory: all tokens through each layer in turn.

Each layer's weights are read once. The hidden states of all tokens are in a file, so memory holds
one layer and one batch, at any size of the checkpoint and any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten, tree_unflatten

from glmd.checkpoint.config import ModelConfig, QuantizedAs, load_config
from glmd.checkpoint.layout import mtp_prefix
from glmd.checkpoint.stored import read_weights
from glmd.errors import CheckpointError
from glmd.evaluate.corpus import Batch, TokenSet
from glmd.kv_cache.stored_keys import store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.attention import attend
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.glm4_moe_lite import LATENT_NORM_EPS, mla_shape
from glmd.model.loader import dtype_in_memory, read_arrays, to_mlx_layout
from glmd.model.mla import MLAShape, project_qkv
from glmd.model.mlx_lm_layers import (
    Glm4MoeLiteDecoderLayer,
    Glm4MoeLiteMoE,
    ModelArgs,
    group_expert_select,
)
from glmd.model.mtp import MTPWeights

BATCH_ROWS = 1024
"""Tokens that run through a layer together; whole samples, so a longer sample is alone."""

LOGITS_ROWS = 128
"""Rows of logits in memory: 80 MB of the published model's vocabulary in float32."""

CACHE_BYTES = 512 << 20
"""Freed buffers that MLX keeps between batches."""

Arrays = dict[str, mx.array]


class PlainLayer:
    """A decoder layer by mlx-lm's modules, with glmd's attention.

    The engine's layers fuse weights, which takes memory and hides the inputs of single matrices.

    Args:
        layer: mlx-lm's decoder layer.

    Attributes:
        chosen: [rows, experts per token], of the last batch; None: a dense layer.
    """

    def __init__(self, layer: Any, shape: MLAShape) -> None:
        self.chosen: mx.array | None = None
        self._layer = layer
        self._shape = shape
        layer.self_attn.kv_a_layernorm.eps = LATENT_NORM_EPS
        layer.self_attn.q_a_layernorm.eps = LATENT_NORM_EPS

    def __call__(self, h: mx.array, batch: ForwardBatch, tails: TailPool) -> mx.array:
        """[rows, hidden] → [rows, hidden]"""
        layer, attn = self._layer, self._layer.self_attn
        queries, kv = project_qkv(attn, self._shape, layer.input_layernorm(h), batch.positions)
        keys = store(kv, self._shape.kv_bits)
        h = h + attn.o_proj(attend(attn, self._shape, 0, queries, keys, batch, tails))
        x = layer.post_attention_layernorm(h)
        sparse = isinstance(layer.mlp, Glm4MoeLiteMoE)
        return h + (self._moe(layer.mlp, x) if sparse else layer.mlp(x))

    def _moe(self, mlp: Any, x: mx.array) -> mx.array:
        gate = mlp.gate
        experts, scores = group_expert_select(
            x.astype(mx.float32) @ gate.weight.T,
            gate.e_score_correction_bias,
            gate.top_k,
            gate.n_group,
            gate.topk_group,
            gate.routed_scaling_factor,
            gate.norm_topk_prob,
        )
        self.chosen = experts
        # On a CPU, MLX multiplies with selected unquantised experts only in float32.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        y = mlp.switch_mlp(x.astype(mx.float32) if on_cpu else x, experts)
        routed = (y * scores[..., None]).sum(axis=-2).astype(x.dtype)
        out: mx.array = routed + mlp.shared_experts(x)
        return out


class LayerReader:
    """A checkpoint in Hugging Face's layout or MLX's, read part by part.

    Args:
        dtype: of activations and of unquantised weights in memory.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or not supported.
    """

    def __init__(self, folder: Path, dtype: mx.Dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.config: ModelConfig = load_config(folder)
        self.stored = read_weights(folder, self.config)
        self.args = ModelArgs.from_dict(msgspec.structs.asdict(self.config))
        self.shape: MLAShape = mla_shape(self.args)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def read(self, prefix: str) -> Arrays:
        """Read the arrays below `prefix` in MLX's layout, when evaluated."""
        is_mtp = prefix.startswith(mtp_prefix(self.config))
        stored = self.stored.mtp if is_mtp else self.stored.main
        arrays = read_arrays({name: t for name, t in stored.items() if name.startswith(prefix)})
        # mlx-lm stacks experts and splits kv_b_proj for `num_hidden_layers` layers.
        args = replace(self.args, num_hidden_layers=self.layers + 1)
        return to_mlx_layout(args, arrays, self._quantization(prefix))

    def embedding(self, arrays: Arrays | None = None) -> Any:
        module = Embedding(self.config.vocab_size, self.config.hidden_size)
        return self.fill(module, "model.embed_tokens", arrays)

    def layer(self, index: int, arrays: Arrays | None = None) -> Any:
        return self.fill(Glm4MoeLiteDecoderLayer(self.args, index), f"model.layers.{index}", arrays)

    def norm(self) -> Any:
        module = RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return self.fill(module, "model.norm")

    def head(self, arrays: Arrays | None = None) -> Any:
        module = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        return self.fill(module, "lm_head", arrays)

    def mtp(self, arrays: Arrays | None = None) -> MTPWeights | None:
        """The MTP layer, with its own embedding and head if stored; None: no MTP layer."""
        if not self.stored.mtp:
            return None
        prefix = mtp_prefix(self.config)
        own_embedding, own_head = self.stored.mtp_vocabulary
        module = MTPWeights(self.args, own_embedding=own_embedding, own_head=own_head)
        self.fill(module, prefix, arrays)
        return module

    def fill(self, module: Module, prefix: str, arrays: Arrays | None = None) -> Any:
        """Load a module's weights, array by array.

        Args:
            prefix: of the names of the module's arrays, without the dot.
            arrays: in place of those in the files, unquantised; None: read them.
        """
        if arrays is None:
            arrays = self.read(prefix + ".")
            quantization = self._quantization(prefix)

            def quantized_as(path: str, part: Module) -> bool | dict[str, Any]:
                full = ".".join(filter(None, (prefix, path)))
                how = quantization.get(full)
                return False if how is None else msgspec.structs.asdict(how)

            module = _quantized(module, quantized_as)
        own = {name.removeprefix(prefix + "."): array for name, array in arrays.items()}
        try:
            module.load_weights(list(own.items()))
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}", file=str(self.folder)) from error
        del arrays, own
        self._evaluate(module)
        return module

    def _quantization(self, prefix: str) -> Mapping[str, QuantizedAs]:
        """The quantisation of modules by path."""
        if not prefix.startswith(mtp_prefix(self.config)):
            return self.stored.quantization
        return {} if self.config.mtp is None else self.config.mtp.quantization

    def _evaluate(self, module: Module) -> None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        flat = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
        for name, array in flat:
            value = array
            if mx.issubdtype(array.dtype, mx.floating):
                experts = ".switch_mlp." in f".{name}" and name.endswith("weight")
                widen = experts and on_cpu
                value = array.astype(mx.float32 if widen else dtype_in_memory(name, self.dtype))
            mx.eval(value)
            module.update(tree_unflatten([(name, value)]))


def _quantized(module: Module, predicate: Callable[[str, Module], bool | dict[str, Any]]) -> Module:
    """Quantise a module's children, or the module itself if it is one matrix."""
    if not hasattr(module, "to_quantized"):
        quantize(module, class_predicate=predicate)
        return module
    how = predicate("", module)
    if not isinstance(how, dict):
        return module
    quantized: Module = module.to_quantized(**how)
    return quantized


# -- running --------------------------------------------------------------------------------


class Activations:
    """Hidden states of all tokens in a file: [tokens, hidden]."""

    def __init__(self, file: Path, tokens: int, hidden: int, dtype: mx.Dtype) -> None:
        self.file = file
        self._dtype = dtype
        kind = np.uint16 if dtype.size == 2 else np.float32
        exists = file.exists() and file.stat().st_size == tokens * hidden * dtype.size
        self._map = np.memmap(file, kind, "r+" if exists else "w+", shape=(tokens, hidden))

    def read(self, start: int, end: int) -> mx.array:
        bits = mx.array(np.asarray(self._map[start:end]))
        return bits if self._dtype.size == 4 else bits.view(self._dtype)

    def write(self, start: int, h: mx.array) -> None:
        h = h.astype(self._dtype)
        bits = h if self._dtype.size == 4 else h.view(mx.uint16)
        self._map[start : start + h.shape[0]] = np.asarray(bits)

    def flush(self) -> None:
        self._map.flush()

    def rename(self, file: Path) -> None:
        self.file = self.file.rename(file)

    def delete(self) -> None:
        del self._map
        self.file.unlink(missing_ok=True)


def forward_batch(
    text: TokenSet, batch: Batch, shape: MLAShape, *, absorbed: bool = False
) -> ForwardBatch:
    """The rows of whole samples as one step without cached context."""
    chunks = []
    for start, end in batch.bounds:
        rows = end - start
        expanded = rows >= shape.break_even_rows and not absorbed
        first = start - batch.start
        chunks.append(PrefillChunk(first, first + rows, [], expanded, rows))
    span = slice(batch.start, batch.end)
    return ForwardBatch(mx.array(text.tokens[span]), mx.array(text.positions[span]), [], chunks)


class LayerRunner:
    """Runs tokens through single layers of one checkpoint."""

    def __init__(
        self,
        text: TokenSet,
        shape: MLAShape,
        dtype: mx.Dtype,
        rows: int,
        *,
        absorbed: bool = False,
    ) -> None:
        """
        Args:
            rows: tokens that run together.
            absorbed: always use the absorbed form of attention, in which every matrix multiplies
                the inputs along its rows.
        """
        self.text = text
        self._absorbed = absorbed
        self.batches = text.batches(rows)
        self._shape = shape
        self._dtype = dtype
        self._tails = TailPool(1, shape.kv_width, dtype)

    def run(
        self,
        layer: Any,
        source: Activations,
        target: Activations,
        observe: Callable[[Batch, mx.array, mx.array | None], None] = lambda batch, h, experts: (
            None
        ),
    ) -> None:
        """Run all tokens through a layer.

        Args:
            layer: mlx-lm's decoder layer.
            observe: called after each batch with its new hidden states, [rows, hidden], and the
                chosen experts, [rows, experts per token], None of a dense layer.
        """
        plain = PlainLayer(layer, self._shape)
        for batch in self.batches:
            h = source.read(batch.start, batch.end)
            rows = forward_batch(self.text, batch, self._shape, absorbed=self._absorbed)
            h = plain(h, rows, self._tails)
            mx.eval(h)
            target.write(batch.start, h)
            observe(batch, h, plain.chosen)

    def embed(self, embedding: Any, target: Activations) -> None:
        """Write the embeddings of all tokens."""
        for batch in self.batches:
            h = embedding(mx.array(self.text.tokens[batch.start : batch.end]))
            target.write(batch.start, h.astype(self._dtype))
