"""What only the CUDA C++ decode has to prove: splits and their merge, ranges, odd top-k, declines.

Shapes shared by all implementations are in test_sparse_mla.py.
"""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops._cuda import jit, mla
from nsa_backend_plugin.ops._torch.packed_rows import pack
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.dense_mla import cuda as dense
from nsa_backend_plugin.ops.sparse_mla import cuda
from tests.ops.common import assert_close
from tools.calls import poison

SCALE = 192**-0.5
FP8_BAR, LSE_BAR = 2e-4, 1e-4


@pytest.mark.parametrize("arch", sorted(cuda.CONFIGS))
def test_compiles(arch: str) -> None:
    missing = jit.available(arch)
    if missing:
        pytest.skip(missing)
    assert cuda.available(arch) is None


@pytest.mark.parametrize("blocks", [132, 264, 396])
@pytest.mark.parametrize("topk", [0, 1, 32, 33, 512, 2048, 2049])
def test_split_count(topk: int, blocks: int) -> None:
    tiles = -(-topk // 32)
    for token_groups in (1, 8, 32, 33, 64, 128, 131, 132, 133, 300, 397, 5000):
        splits = mla.split_count(token_groups, topk, blocks, 32)
        assert 1 <= splits <= max(1, min(32, tiles))
        assert splits == 1 or token_groups * splits <= mla._MAX_WAVES * blocks


def test_few_tokens_fill_the_gpu() -> None:
    for token_groups, splits in ((1, 32), (8, 32), (16, 16), (32, 8), (64, 4), (132, 2), (264, 1)):
        assert mla.split_count(token_groups, 2048, 264, 32) == splits
    assert mla.split_count(256, 2048, 396, 32) == 3  # two nearly full waves of short blocks, not one with gaps
    assert mla.split_count(4000, 2048, 396, 32) == 1


@pytest.mark.parametrize("arch", ["sm_90", "sm_89"])
@pytest.mark.parametrize("heads", [1, 16, 17, 128])
@pytest.mark.parametrize("keys, configs", [(2048, cuda.CONFIGS), (2048, dense.CONFIGS), (163840, dense.CONFIGS)])
def test_workspace_suffices_for_every_smaller_call(
    monkeypatch: pytest.MonkeyPatch, keys: int, configs: mla.Configs, heads: int, arch: str
) -> None:
    monkeypatch.setattr(mla, "device_arch", lambda device: arch)
    monkeypatch.setattr(mla, "core_count", lambda device: 132)
    device = torch.device("cuda")
    groups = mla.groups(heads)
    for max_tokens in (1, 5, 64, 300, 2000):
        size = mla.workspace_bytes(device, configs, max_tokens, heads, 512)
        for tokens in range(1, max_tokens + 1):
            config = mla._config(configs[arch], tokens * groups)
            blocks = mla.resident_blocks(device, config)
            splits = mla.split_count(tokens * groups, keys, blocks, config.rows.max_splits)
            assert splits == 1 or sum(mla.layout(tokens * splits, heads, 512)) <= size


def make(
    tokens: int, heads: int, topk: int, q_size: float = 1.0, kv_size: float = 1.0, slots: int = 4096
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = (torch.randn(tokens, heads, 576, device="cuda") * q_size).bfloat16()
    kv = pack((torch.randn(slots, 576, device="cuda") * kv_size).bfloat16(), 512).unsqueeze(1)
    kv[0] = 0xFF  # NaN in a slot that no index names
    indices = torch.randint(1, slots, (tokens, topk), dtype=torch.int32, device="cuda")
    return q, kv, indices


def check(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float = SCALE) -> None:
    tokens, heads, _ = q.shape
    out = poison(tokens, heads, 512, dtype=torch.bfloat16, device=q.device)
    needed = sparse_mla.workspace_bytes(tokens, heads, indices.shape[1], q.device)
    workspace = poison(max(needed, 1), dtype=torch.uint8, device=q.device)
    options = dict(return_lse=True, out=out, workspace=workspace)
    out, lse = sparse_mla.attend(q, kv, indices, scale, impl="cuda", **options)
    expected, expected_lse = sparse_mla.attend(q, kv, indices, scale, return_lse=True, impl="torch")
    assert_close(out, expected, FP8_BAR)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(expected_lse))
    torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=LSE_BAR, atol=LSE_BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 8, 12, 16, 17, 24, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 32, 33, 133, 300])
def test_heads_and_tokens(heads: int, tokens: int) -> None:
    check(*make(tokens, heads, 2048))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [12, 32])
@pytest.mark.parametrize("splits", range(1, 33))
def test_any_number_of_splits(monkeypatch: pytest.MonkeyPatch, heads: int, splits: int) -> None:
    monkeypatch.setattr(mla, "split_count", lambda *shape: splits)
    check(*make(3, heads, 1100))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("topk", [0, 1, 31, 32, 33, 63, 64, 65, 200, 2047, 2049])
def test_any_top_k(heads: int, topk: int) -> None:
    check(*make(3, heads, topk))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("tokens", [4, 150])
def test_missing_slots(heads: int, tokens: int) -> None:
    q, kv, indices = make(tokens, heads, 2048)
    indices[torch.rand(indices.shape, device="cuda") < 0.5] = -1
    indices[0] = -1  # a row without slots
    indices[1, 1:] = -1
    indices[2, :1500] = -1  # whole splits without slots
    check(q, kv, indices)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("q_size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("kv_size", [1e-4, 1.0, 1e4])
def test_magnitudes(heads: int, q_size: float, kv_size: float) -> None:
    """Scores stay moderate by the softmax scale, so that the answer averages many rows."""
    check(*make(5, heads, 512, q_size, kv_size), scale=SCALE / (q_size * kv_size))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
def test_rows_of_very_different_size(heads: int) -> None:
    q, kv, indices = make(6, heads, 1024)
    sizes = torch.logspace(-4, 4, 4096, device="cuda")[torch.randperm(4096, device="cuda"), None]
    kv = pack((torch.randn(4096, 576, device="cuda") * sizes).bfloat16(), 512).unsqueeze(1)
    kv[7] = 0  # an all-zero tile with a zero scale
    indices[:, 5] = 7
    check(q, kv, indices, scale=1e-6)


@pytest.mark.gpu
def test_20_runs_give_the_same_bits() -> None:
    for heads in (16, 32):
        q, kv, indices = make(9, heads, 2048)
        first = sparse_mla.attend(q, kv, indices, SCALE, impl="cuda").view(torch.int16)
        for _ in range(20):
            assert torch.equal(sparse_mla.attend(q, kv, indices, SCALE, impl="cuda").view(torch.int16), first)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
def test_graph_replay(heads: int) -> None:
    """Whatever other shape used the workspace in between; captured calls follow each other without a gap."""
    q, kv, indices = make(8, heads, 2048)
    out = torch.empty(8, heads, 512, dtype=torch.bfloat16, device="cuda")
    bytes_needed = max(sparse_mla.workspace_bytes(n, heads, 2048, q.device) for n in (8, 32))
    workspace = poison(bytes_needed, dtype=torch.uint8, device=q.device)
    options = dict(out=out, workspace=workspace, impl="cuda")
    sparse_mla.attend(q, kv, indices, SCALE, **options)
    graph = torch.cuda.CUDAGraph()
    others = [make(8, heads, 2048)[0] for _ in range(3)]
    with torch.cuda.graph(graph):
        for other in others:  # each writes the workspace and `out` that the one before it has just read and written
            sparse_mla.attend(other, kv, indices, SCALE, **options)
        sparse_mla.attend(q, kv, indices, SCALE, **options)
    for replay in range(6):
        q.normal_()
        indices.random_(1, 4096)
        indices[:, 2048 >> replay :] = -1
        if replay == 3:
            check_shape = make(32, heads, 2048)
            sparse_mla.attend(*check_shape, SCALE, workspace=workspace, impl="cuda")
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, sparse_mla.attend(q, kv, indices, SCALE, impl="torch"), FP8_BAR)


@pytest.mark.gpu
def test_declines_and_refuses() -> None:
    q, kv, indices = make(2, 16, 64)
    with pytest.raises(ValueError, match="only bfloat16"):
        sparse_mla.attend(q.half(), kv, indices, SCALE, impl="cuda")
    workspace = torch.empty(8, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"workspace\.numel\(\)=8"):
        sparse_mla.attend(q, kv, indices, SCALE, impl="cuda", workspace=workspace)
    assert cuda.available(device_arch("cuda")) is None
