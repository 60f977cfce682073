"""A DeepSeek-V3.2 model for training: multi-head latent attention with a trainable sparse indexer.

Parameter names are those of the published checkpoints, so export is a change of dtype. The indexer is trained as
in the DeepSeek-V3.2 report: its inputs are detached, and its only loss is the KL divergence from the attention
distribution (mean over heads) to the softmax of the index scores, over all earlier keys during the warm-up and
over the selected keys afterwards.

Queries are processed in blocks of `ROWS` with recomputation in the backward pass: the scores of 32 index heads over
6k x 6k positions would not fit otherwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from config import Mode, ModelConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS = 1024


class Output(NamedTuple):
    """logits [B, T, vocab]; index_kl: scalar mean over layers and positions (0 when the indexer is not trained)."""

    logits: Tensor
    index_kl: Tensor


class IndexInputs(NamedTuple):
    """query [B, T, H, 128] and key [B, T, 128] after RoPE; weight [B, T, H] with all scales folded in."""

    query: Tensor
    key: Tensor
    weight: Tensor


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


def rope_table(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, 1, dim / 2] of the rotary angles, fp32."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] by pairs (2i, 2i + 1): main attention, and GLM's indexer."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def rope_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] by pairs (i, i + d/2): DeepSeek-V3.2's indexer."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rope_dim, self.heads, self.dim = config.qk_rope_head_dim, config.index_n_heads, config.index_head_dim
        self.wq_b = _linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = _linear(config.hidden_size, self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = _linear(config.hidden_size, self.heads)

    def forward(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> IndexInputs:
        query = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        key = self.k_norm(self.wk(x)).unsqueeze(2)
        query, key = (
            torch.cat([rope_half_split(t[..., : self.rope_dim], cos, sin), t[..., self.rope_dim :]], -1)
            for t in (query, key)
        )
        weight = self.weights_proj(x).float() * (self.heads * self.dim) ** -0.5
        return IndexInputs(query, key.squeeze(2), weight)


def index_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """Scores [B, t, s] fp32 = sum over heads of weight * relu(query . key), for query [B, t, H, d], key [B, s, d]."""
    per_head = torch.relu_(query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, query.shape[1:3])
    return (weight.unsqueeze(2).to(per_head.dtype) @ per_head).squeeze(2).float()


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, index: IndexInputs, first_row: int, mode: Mode, topk: int
) -> tuple[Tensor, Tensor]:
    """Attention of some rows, and the sum over them of the indexer's KL.

    query [B, h, t, d] already scaled, rows first_row ...; key [B, h, s, d], value [B, h, s, v] with
    s = first_row + t; index.query and index.weight hold the same rows, index.key all s keys.
    """
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys, device=query.device)
    row = torch.arange(first_row, first_row + rows, device=query.device)[:, None]
    visible = (position <= row)[None]
    if mode is Mode.WINDOW:
        visible = visible & (position > row - topk)
    else:
        scores = index_scores(*index._replace(key=index.key[:, :keys])).masked_fill(~visible, -math.inf)
    if mode is Mode.SPARSE and keys > topk:
        chosen = scores.detach().topk(topk, sorted=False).indices
        visible = visible & torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)

    # fp32 logits: in bf16 the sharp previous-token heads (logits near 60) would lose two digits.
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-1, -2)
    probs = torch.softmax(logits.masked_fill(~visible[:, None], -math.inf), -1)
    out = probs.to(value.dtype) @ value
    if mode is Mode.WINDOW:
        return out, out.new_zeros((), dtype=torch.float32)
    target = probs.detach().mean(1)
    log_index = torch.log_softmax(scores.masked_fill(~visible, -math.inf), -1).masked_fill(~visible, 0.0)
    return out, (torch.xlogy(target, target) - target * log_index).sum()


def indexed_attention(
    query: Tensor, key: Tensor, value: Tensor, index: IndexInputs, mode: Mode, topk: int
) -> tuple[Tensor, Tensor]:
    """Causal attention under `mode`: output [B, h, T, v] and the mean KL of the indexer."""
    batch, _, length, _ = query.shape
    outputs, kl = [], torch.zeros((), device=query.device)
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        part = IndexInputs(index.query[:, start:end], index.key, index.weight[:, start:end])
        args = (query[:, :, start:end], key[:, :, :end], value[:, :, :end], part, start, mode, topk)
        if torch.is_grad_enabled():
            out, part_kl = checkpoint(_attend_rows, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            out, part_kl = _attend_rows(*args)
        outputs.append(out)
        kl = kl + part_kl
    return torch.cat(outputs, 2), kl / (batch * length)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_heads, config.hidden_size
        self.q_a_proj = _linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = _linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = _linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        outputs = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = _linear(config.kv_lora_rank, heads * outputs)
        if config.kv_b_block_diagonal:
            blocks = torch.block_diag(*[torch.ones(outputs, config.kv_lora_rank // heads)] * heads)
            self.kv_b_proj.weight.data *= blocks * heads**0.5  # as large an output from fewer inputs
            self.register_buffer("kv_b_blocks", blocks, persistent=False)
            self.kv_b_proj.weight.register_hook(lambda gradient: gradient * self.kv_b_blocks)
        self.o_proj = _linear(heads * config.v_head_dim, hidden, gain=(2 * config.num_layers) ** -0.5)
        self.indexer = Indexer(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        c = self.config
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_nope, q_rope = (
            self.q_b_proj(q_latent)
            .unflatten(-1, (c.num_heads, c.qk_head_dim))
            .split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        k_nope, value = (
            self.kv_b_proj(self.kv_a_layernorm(latent))
            .unflatten(-1, (c.num_heads, c.qk_nope_head_dim + c.v_head_dim))
            .split([c.qk_nope_head_dim, c.v_head_dim], -1)
        )
        k_rope = rope_interleaved(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, c.num_heads, -1)
        query = torch.cat([q_nope, rope_interleaved(q_rope, cos, sin)], -1).transpose(1, 2)
        key, value = torch.cat([k_nope, k_rope], -1).transpose(1, 2), value.transpose(1, 2)
        if mode is Mode.DENSE:
            # Flash kernels want values as wide as keys.
            padded = F.pad(value, (0, c.qk_head_dim - c.v_head_dim))
            out = F.scaled_dot_product_attention(query, key, padded, is_causal=True)[..., : c.v_head_dim]
            kl = torch.zeros((), device=x.device)
        else:
            index = self.indexer(x.detach(), q_latent.detach(), cos, sin)
            out, kl = indexed_attention(query * c.qk_head_dim**-0.5, key, value, index, mode, c.index_topk)
        return self.o_proj(out.transpose(1, 2).flatten(2)), kl


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, gain=(2 * config.num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        attended, kl = self.self_attn(self.input_layernorm(x), cos, sin, mode)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kl


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TinyDSA(nn.Module):
    """The language model. `forward` takes ids [B, T] int64."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size)

    def forward(self, ids: Tensor, mode: Mode = Mode.SPARSE) -> Output:
        cos, sin = rope_table(ids.shape[1], self.config.qk_rope_head_dim, self.config.rope_theta, ids.device)
        x = self.model.embed_tokens(ids)
        total_kl = torch.zeros((), device=ids.device)
        for layer in self.model.layers:
            x, kl = layer(x, cos, sin, mode)
            total_kl = total_kl + kl
        return Output(self.lm_head(self.model.norm(x)), total_kl / len(self.model.layers))

    @torch.no_grad()
    def start_as_previous_token_heads(self, sharpness: float = 45.0) -> None:
        """Make head h of the first layer attend to the token h + 1 back.

        Such heads are what in-context copying is built on, and a model this small is slow to find them. Embedding
        dimension 0 becomes a constant, from which query and key get fixed RoPE phases `h + 1` positions apart. The
        embeddings get equal norms, so that the constant is the same in every key after the layer norm.
        """
        c = self.config
        attention = self.model.layers[0].self_attn
        embedding = self.model.embed_tokens.weight
        embedding *= embedding.norm() / (len(embedding) ** 0.5 * embedding[:, 1:].norm(dim=1, keepdim=True))
        embedding[:, 0] = 1.0
        attention.q_a_proj.weight[0] = 0.0
        attention.q_a_proj.weight[0, 0] = 1.0
        key_rope = attention.kv_a_proj_with_mqa.weight[c.kv_lora_rank :]
        key_rope.zero_()
        key_rope[0::2, 0] = 0.5
        query = attention.q_b_proj.weight.view(c.num_heads, c.qk_head_dim, c.q_lora_rank)
        query[:, : c.qk_nope_head_dim] *= 0.2
        query_rope = query[:, c.qk_nope_head_dim :]
        query_rope.zero_()
        # Periods of 6 to 150 tokens: slower ones cannot tell neighbours apart, fewer would repeat within the context.
        used = 12
        pair = torch.arange(used, device=query.device)
        frequency = c.rope_theta ** (-2.0 * pair / c.qk_rope_head_dim)
        for head in range(c.num_heads):
            phase = (head + 1) * frequency
            query_rope[head, 2 * pair, 0] = sharpness * phase.cos()
            query_rope[head, 2 * pair + 1, 0] = -sharpness * phase.sin()
