"""The demo network: transformers' `Glm4MoeLiteForCausalLM` plus the MTP layer."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm


def config(vocabulary: int, end_ids: list[int], pad_id: int) -> Glm4MoeLiteConfig:
    """Return a small GLM-4.7-Flash shape; quantised input widths are multiples of 64."""
    return Glm4MoeLiteConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        bos_token_id=None,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
    )


class SharedHead(nn.Module):
    def __init__(self, settings: Glm4MoeLiteConfig) -> None:
        super().__init__()
        self.norm = glm.Glm4MoeLiteRMSNorm(settings.hidden_size, settings.rms_norm_eps)


class MTPLayer(glm.Glm4MoeLiteDecoderLayer):
    """Decoder layer that predicts the token after the next.

    It uses the main model's embedding and head; the checkpoint holds copies of both.
    """

    def __init__(self, settings: Glm4MoeLiteConfig) -> None:
        extended = copy.deepcopy(settings)
        extended.mlp_layer_types = [*settings.mlp_layer_types, "sparse"]
        extended._attn_implementation = "sdpa"
        super().__init__(extended, layer_idx=settings.num_hidden_layers)
        width = settings.hidden_size
        self.enorm = glm.Glm4MoeLiteRMSNorm(width, settings.rms_norm_eps)
        self.hnorm = glm.Glm4MoeLiteRMSNorm(width, settings.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = SharedHead(settings)


class Network(nn.Module):
    def __init__(self, settings: Glm4MoeLiteConfig) -> None:
        super().__init__()
        self.main = Glm4MoeLiteForCausalLM(settings)
        self.mtp = MTPLayer(settings)
        self.mtp.apply(self.main._init_weights)

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return hidden states after the final norm: [batch, length, width].

        Attention is causal if `mask` is None.
        """
        trunk = self.main.model
        state = trunk.embed_tokens(ids)
        angles = trunk.rotary_emb(state, positions_of(ids, positions))
        for layer in trunk.layers:
            state = layer(state, position_embeddings=angles, attention_mask=mask)
        final: Tensor = trunk.norm(state)
        return final

    def drafted(
        self,
        hidden: Tensor,
        following: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the MTP layer's output before the head: [batch, length, width].

        Args:
            hidden: Hidden states of the main model, [batch, length, width].
            following: The next token of each position, [batch, length].
        """
        trunk = self.main.model
        embedded = self.mtp.enorm(trunk.embed_tokens(following))
        state = self.mtp.eh_proj(torch.cat([embedded, self.mtp.hnorm(hidden)], dim=-1))
        angles = trunk.rotary_emb(state, positions_of(following, positions))
        state = super(MTPLayer, self.mtp).forward(
            state, position_embeddings=angles, attention_mask=mask
        )
        final: Tensor = self.mtp.shared_head.norm(state)
        return final


def positions_of(ids: Tensor, positions: Tensor | None) -> Tensor:
    return torch.arange(ids.shape[1])[None] if positions is None else positions


@torch.no_grad()
def start_copying(network: Network) -> None:
    """Initialize induction heads (Olsson et al. 2022), which copy from the context.

    The two heads are useless alone, so training from noise takes millions of tokens to find them.
    A head of layer 0 writes a code of the previous token into each token. A head of layer 1 attends
    to the token after an earlier occurrence of the current one, and adds it to the prediction.
    Embeddings leave the dimensions of the code free and have one constant entry, for the positions.
    """
    settings = network.main.config
    nope, rope, value = (
        settings.qk_nope_head_dim, settings.qk_rope_head_dim, settings.v_head_dim
    )  # fmt: skip
    code = settings.kv_lora_rank // 2
    words = slice(1, settings.hidden_size - code)
    codes = slice(settings.hidden_size - code, None)
    count = settings.hidden_size - code - 1
    projection = torch.linalg.qr(torch.randn(count, code)).Q.T

    trunk = network.main.model
    trunk.embed_tokens.weight[:, 0] = 0.1
    trunk.embed_tokens.weight[:, codes] = 0
    network.main.lm_head.weight.copy_(3 * trunk.embed_tokens.weight)

    back = trunk.layers[0].self_attn
    back.q_a_proj.weight[0] = 0
    back.q_a_proj.weight[0, 0] = 1
    frequencies = trunk.rotary_emb.inv_freq[:4]
    keys = back.kv_a_proj_with_mqa.weight[settings.kv_lora_rank :]
    keys.zero_()
    keys[0 : 2 * len(frequencies) : 2, 0] = 1
    for head, distance in enumerate((1, 2)):
        start = head * (nope + rope)
        query = back.q_b_proj.weight[start + nope : start + nope + rope]
        query.zero_()
        query[0 : 2 * len(frequencies) : 2, 0] = torch.cos(distance * frequencies)
        query[1 : 2 * len(frequencies) : 2, 0] = -torch.sin(distance * frequencies)
    back.kv_a_proj_with_mqa.weight[:code] = 0
    back.kv_a_proj_with_mqa.weight[:code, words] = projection
    back.kv_b_proj.weight[nope : nope + value] = torch.eye(value, settings.kv_lora_rank)
    back.o_proj.weight[:, :value] = 0
    back.o_proj.weight[codes, :value] = 0.02 * torch.eye(code, value)

    find = trunk.layers[1].self_attn
    find.q_a_proj.weight[:code] = 0
    find.q_a_proj.weight[:code, words] = projection
    find.q_b_proj.weight[:nope] = 1.5 * torch.eye(nope, settings.q_lora_rank)
    find.kv_a_proj_with_mqa.weight[: 2 * code] = 0
    find.kv_a_proj_with_mqa.weight[:code, codes] = torch.eye(code)
    find.kv_a_proj_with_mqa.weight[code : 2 * code, words] = projection
    find.kv_b_proj.weight[:nope] = torch.eye(nope, settings.kv_lora_rank)
    find.kv_b_proj.weight[nope : nope + value] = torch.eye(value, settings.kv_lora_rank).roll(
        code, 1
    )
    find.o_proj.weight[:, :value] = 0
    find.o_proj.weight[words, :value] = 0.1 * projection.T


def dense_experts(
    self: glm.Glm4MoeLiteExperts, state: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Compute all experts for all tokens in two matrix products, with weight 0 if not chosen.

    For experts of this size, dense products are several times faster than gathering tokens by
    expert. `load` counts the tokens of each expert.
    """
    scale = torch.zeros(state.shape[0], self.num_experts, dtype=state.dtype)
    scale = scale.scatter(1, chosen, weights.to(state.dtype))
    self.load.add_((scale.detach() > 0).sum(0))
    both = F.linear(state, self.gate_up_proj.flatten(0, 1))
    gate, up = both.view(-1, self.num_experts, 2, self.intermediate_dim).unbind(2)
    middle = F.silu(gate) * up * scale[..., None]
    return middle.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1)


def make_fast(network: Network) -> None:
    """Replace the experts by `dense_experts`, and check that the output stays the same."""
    ids = torch.randint(network.main.config.vocab_size, (2, 64))
    expected = network.hidden(ids)
    every = [part for part in network.modules() if isinstance(part, glm.Glm4MoeLiteExperts)]
    for experts in every:
        experts.load = nn.Buffer(
            torch.zeros(experts.num_experts, dtype=torch.long), persistent=False
        )
    glm.Glm4MoeLiteExperts.forward = dense_experts
    torch.testing.assert_close(network.hidden(ids), expected)


@torch.no_grad()
def balance(network: Network, rate: float) -> float:
    """Update each router's correction bias against the load of the last step.

    Returns:
        The load of the busiest expert of all routers, in multiples of the router's mean.
    """
    worst = 0.0
    for part in network.modules():
        if isinstance(part, glm.Glm4MoeLiteMoE):
            load = part.experts.load.float()
            part.gate.e_score_correction_bias.add_(rate * (load.mean() - load).sign())
            worst = max(worst, float(load.max() / load.mean()))
            part.experts.load.zero_()
    return worst
