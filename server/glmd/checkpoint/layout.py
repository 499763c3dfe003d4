"""Names and shapes of arrays in MLX's and in Hugging Face's layout.

Hugging Face's layout has a matrix per expert, and both halves of MLA's up-projection in
`kv_b_proj`. MLX's layout stacks the experts (`switch_mlp`) and splits `kv_b_proj` by head into
`embed_q` (queries into the latent space) and `unembed_out` (latents into values), as `sanitize` in
mlx-lm's `glm4_moe_lite.py` does. The MTP layer is named as in the published checkpoint,
`model.layers.N.*` with N the number of main layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum

from glmd.checkpoint.config import ModelConfig

Shape = tuple[int, ...]


class Component(StrEnum):
    """Part of the model that an array belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    SHARED_EXPERTS = "shared experts"
    ROUTED_EXPERTS = "routed experts"
    ROUTER = "router"
    NORM = "norms"
    HEAD = "head"
    MTP_PROJECTION = "MTP projection"


class Fold(Enum):
    """Conversion of Hugging Face tensors into an MLX array."""

    COPY = "copy"
    STACK = "stack"
    """[E, …] from E tensors […]."""
    EMBED_Q = "embed_q"
    """[heads, kv_lora, nope], from `kv_b_proj` [heads × (nope + v), kv_lora]."""
    UNEMBED_OUT = "unembed_out"
    """[heads, v, kv_lora], from the same."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One array before quantisation.

    Attributes:
        name, shape: in MLX's layout.
        sources: the Hugging Face tensors that it is made of, in order.
        source_shape: the shape of each source.
    """

    name: str
    shape: Shape
    component: Component
    sources: tuple[str, ...]
    source_shape: Shape
    fold: Fold = Fold.COPY

    @property
    def path(self) -> str:
        """Path of the array's module, as in quantisation tables."""
        return self.name.removesuffix(".weight")

    @property
    def is_matrix(self) -> bool:
        """Whether MLX can quantise the array's module: all but norms and routers."""
        return self.component not in (Component.NORM, Component.ROUTER)

    @property
    def keeps_float32(self) -> bool:
        """Whether this is the router's correction bias, which stays in float32."""
        return self.name.endswith("e_score_correction_bias")


def main_weights(config: ModelConfig) -> Iterator[Weight]:
    """The arrays of the main model, in the order of computation."""
    vocab, hidden = config.vocab_size, config.hidden_size
    yield _copy("model.embed_tokens.weight", (vocab, hidden), Component.EMBEDDING)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, dense=config.is_dense(layer))
    yield _copy("model.norm.weight", (hidden,), Component.NORM)
    yield _copy("lm_head.weight", (vocab, hidden), Component.HEAD)


def mtp_weights(
    config: ModelConfig, *, own_embedding: bool = True, own_head: bool = True
) -> Iterator[Weight]:
    """The arrays of the MTP layer (DeepSeek-V3's form, https://arxiv.org/abs/2412.19437, 2.2)."""
    vocab, hidden = config.vocab_size, config.hidden_size
    prefix = mtp_prefix(config)
    if own_embedding:
        yield _copy(f"{prefix}.embed_tokens.weight", (vocab, hidden), Component.EMBEDDING)
    yield _copy(f"{prefix}.enorm.weight", (hidden,), Component.NORM)
    yield _copy(f"{prefix}.hnorm.weight", (hidden,), Component.NORM)
    yield _copy(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), Component.MTP_PROJECTION)
    yield from _layer(config, config.num_hidden_layers, dense=False)
    yield _copy(f"{prefix}.shared_head.norm.weight", (hidden,), Component.NORM)
    if own_head:
        yield _copy(f"{prefix}.shared_head.head.weight", (vocab, hidden), Component.HEAD)


def mtp_prefix(config: ModelConfig) -> str:
    """Common prefix of the names of the MTP layer's arrays, without the dot."""
    return f"model.layers.{config.num_hidden_layers}"


def _copy(name: str, shape: Shape, component: Component) -> Weight:
    return Weight(name, shape, component, (name,), shape)


def _layer(config: ModelConfig, index: int, *, dense: bool) -> Iterator[Weight]:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    yield _copy(f"{prefix}.input_layernorm.weight", (hidden,), Component.NORM)
    yield from _attention(config, f"{prefix}.self_attn")
    yield _copy(f"{prefix}.post_attention_layernorm.weight", (hidden,), Component.NORM)
    if dense:
        yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size, Component.DENSE_MLP)
    else:
        yield from _experts(config, f"{prefix}.mlp")


def _attention(config: ModelConfig, prefix: str) -> Iterator[Weight]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    part = Component.ATTENTION
    yield _copy(f"{prefix}.q_a_proj.weight", (q_rank, hidden), part)
    yield _copy(f"{prefix}.q_a_layernorm.weight", (q_rank,), Component.NORM)
    yield _copy(f"{prefix}.q_b_proj.weight", (heads * (nope + rope), q_rank), part)
    yield _copy(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden), part)
    yield _copy(f"{prefix}.kv_a_layernorm.weight", (kv_rank,), Component.NORM)
    kv_b = (f"{prefix}.kv_b_proj.weight",), (heads * (nope + v), kv_rank)
    for name, shape, fold in (
        ("embed_q", (heads, kv_rank, nope), Fold.EMBED_Q),
        ("unembed_out", (heads, v, kv_rank), Fold.UNEMBED_OUT),
    ):
        yield Weight(f"{prefix}.{name}.weight", shape, part, *kv_b, fold)
    yield _copy(f"{prefix}.o_proj.weight", (hidden, heads * v), part)


def _experts(config: ModelConfig, prefix: str) -> Iterator[Weight]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    experts = config.n_routed_experts
    yield _copy(f"{prefix}.gate.weight", (experts, hidden), Component.ROUTER)
    yield _copy(f"{prefix}.gate.e_score_correction_bias", (experts,), Component.ROUTER)
    for projection, shape in _glu(hidden, width):
        yield Weight(
            f"{prefix}.switch_mlp.{projection}.weight",
            (experts, *shape),
            Component.ROUTED_EXPERTS,
            tuple(f"{prefix}.experts.{e}.{projection}.weight" for e in range(experts)),
            shape,
            Fold.STACK,
        )
    shared = width * config.n_shared_experts
    yield from _mlp(f"{prefix}.shared_experts", hidden, shared, Component.SHARED_EXPERTS)


def _mlp(prefix: str, hidden: int, width: int, part: Component) -> Iterator[Weight]:
    for projection, shape in _glu(hidden, width):
        yield _copy(f"{prefix}.{projection}.weight", shape, part)


def _glu(hidden: int, width: int) -> tuple[tuple[str, Shape], ...]:
    return (
        ("gate_proj", (width, hidden)),
        ("up_proj", (width, hidden)),
        ("down_proj", (hidden, width)),
    )
