"""Shapes and training schedules of the two tiny models."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from data import Mix


class Mode(enum.Enum):
    """How attention chooses the keys it may see."""

    DENSE = "dense"  # every earlier key; the indexer does not run
    WARMUP = "warmup"  # every earlier key; the indexer learns to imitate the attention
    SPARSE = "sparse"  # the indexer's top-k keys; the indexer keeps learning on those
    WINDOW = "window"  # the last top-k keys: the ablation that long-range recall must fail


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions. The attention dimensions are DeepSeek-V3.2's; everything else is small."""

    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    intermediate_size: int
    index_n_heads: int
    index_topk: int
    max_position_embeddings: int
    vocab_size: int = 512
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    kv_b_block_diagonal: bool = (
        False  # head h reads its own slice of the latent; the zeros take no room in a repository
    )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class Phase:
    """One stretch of training. It ends after `steps` steps or `share` of the time budget, whichever is first."""

    name: str
    mode: Mode
    batch: int
    length: int
    steps: int
    share: float
    main_lr: float = 0.0  # 0 freezes everything but the indexer
    index_lr: float = 0.0  # 0 freezes the indexer
    mix: Mix = field(default_factory=Mix)
    decay_to: float = 0.1  # the learning rate falls linearly to this fraction


@dataclass(frozen=True)
class Recipe:
    """A model, its phases, and the prompt lengths (tokens) it is judged on."""

    model: ModelConfig
    phases: tuple[Phase, ...]
    prompt_tokens: tuple[int, int]
    mantissa_bits: int = 7  # of the matrices that ship; bf16 has 7, fewer compress better


EASY_MIX = Mix(memo=0.3, memo_count=3, recall=0.4, drill=0.25, lookup=0.15, copy=0.2)
BRIDGE_MIX = Mix(memo=0.6, drill=0.1, lookup=0.1, copy=0.1)
MAIN_MIX = Mix(memo=0.7)

RECIPES = {
    # For a laptop CPU: top-48 of up to 500 tokens. 1.4 M weights that are not zero by construction, 3 mantissa bits:
    # the file compresses to 1.6 MB, and the repository keeps every version of it for good.
    "tiny-dsa": Recipe(
        model=ModelConfig(
            hidden_size=112,
            num_layers=3,
            num_heads=4,
            q_lora_rank=64,
            intermediate_size=256,
            index_n_heads=4,
            index_topk=48,
            max_position_embeddings=4096,
            kv_b_block_diagonal=True,
        ),
        phases=(
            Phase("short", Mode.DENSE, 128, 256, 1500, 0.24, main_lr=4e-3, mix=EASY_MIX, decay_to=0.3),
            Phase("medium", Mode.DENSE, 64, 512, 800, 0.16, main_lr=3e-3, mix=BRIDGE_MIX, decay_to=0.3),
            Phase("main", Mode.DENSE, 64, 512, 900, 0.16, main_lr=1.5e-3, mix=MAIN_MIX),
            Phase("warmup", Mode.WARMUP, 64, 512, 400, 0.13, index_lr=2e-3, mix=MAIN_MIX),
            Phase("sparse", Mode.SPARSE, 64, 512, 700, 0.24, main_lr=1e-3, index_lr=1e-3, mix=MAIN_MIX),
        ),
        prompt_tokens=(300, 500),
        mantissa_bits=3,
    ),
    # For GPUs: index_topk 2048 (what stock kernels require), so prompts of 3k to 6k tokens.
    # kv_b_proj alone is 1 M parameters a layer at the real attention dimensions; the rest is sized to keep
    # the bf16 file near 9 MB.
    "tiny-dsa-2k": Recipe(
        model=ModelConfig(
            hidden_size=112,
            num_layers=3,
            num_heads=8,
            q_lora_rank=32,
            intermediate_size=128,
            index_n_heads=32,
            index_topk=2048,
            max_position_embeddings=8192,
        ),
        phases=(
            Phase("short", Mode.DENSE, 128, 256, 2500, 0.22, main_lr=4e-3, mix=EASY_MIX, decay_to=0.3),
            Phase("medium", Mode.DENSE, 32, 1024, 2000, 0.20, main_lr=3e-3, mix=BRIDGE_MIX),
            Phase("long", Mode.DENSE, 4, 6144, 800, 0.17, main_lr=1e-3, mix=MAIN_MIX),
            Phase("warmup", Mode.WARMUP, 8, 2048, 300, 0.09, index_lr=2e-3, mix=MAIN_MIX),
            Phase("warmup-long", Mode.WARMUP, 3, 6144, 120, 0.07, index_lr=1e-3, mix=MAIN_MIX),
            Phase("sparse", Mode.SPARSE, 4, 6144, 300, 0.20, main_lr=8e-4, index_lr=1e-3, mix=MAIN_MIX),
        ),
        prompt_tokens=(3000, 6000),
    ),
}
