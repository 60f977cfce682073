"""Decode context parallelism: a cache whose tokens are split over GPUs, its GPUs one after the other.

SGLang's own kernels write the rows, gather their places and merge what the GPUs answer, in Triton's interpreter. Its
collectives are CUDA's, so that no CPU runs its servers: here every GPU's part is handed over by hand. What two GPUs
answer is in test_gpu_parallel.py.
"""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import arguments, launch, query, release
from nsa_backend_plugin.engine.gpu import shards
from nsa_backend_plugin.ops.call import Step
from tests.engine import bare

pytest.importorskip("sglang", reason="needs SGLang")
from tests.engine.test_mla_backend import mla_backend

dsa_backend = pytest.importorskip("nsa_backend_plugin.engine.gpu.dsa_backend")
forward_mla = pytest.importorskip("sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla")
comm = pytest.importorskip("sglang.srt.layers.dcp.comm")
mla_buffer = pytest.importorskip("sglang.kernels.ops.kvcache.mla_buffer")
dcp_kernels = pytest.importorskip("sglang.kernels.ops.attention.dcp_kernels")
dsa_utils = pytest.importorskip("sglang.srt.layers.attention.dsa.utils")
batch_info = pytest.importorskip("sglang.srt.model_executor.forward_batch_info")

HEADS, SCALE = 2, 0.1
SPLITS_INDEXED = release.exists(launch.SPLITS_ROWS_OF_INDEXED)
#: Tokens of each request: of the first ones some GPUs have none.
LENGTHS = [1, 2, 3, 63, 64, 65, 130, 200]
#: Of a sum of bf16-free computations, against float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Group:
    """GPUs that split every context; `parallel` is of the one that is `rank`."""

    def __init__(self, size: int, page_size: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch):
        self.size, self.page_size, self.lengths = size, page_size, lengths
        self.parallel = SimpleNamespace(dcp_enabled=True, dcp_size=size, attn_dcp_size=size, attn_cp_size=1)
        self.on(0)
        for module in (mla_buffer, comm, dsa_utils):
            monkeypatch.setattr(module, "get_parallel", lambda: self.parallel)
        monkeypatch.setattr(mla_buffer, "is_arch_support_pdl", lambda: False)
        monkeypatch.setattr(comm, "use_symmetric_memory", lambda group: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        large = size * page_size  # of SGLang's allocator
        pages = -(-max(lengths) // large)
        # Slot 0 pads batches: SGLang never hands out the first page.
        order = torch.randperm(len(lengths) * pages).view(len(lengths), pages) + 1
        #: [requests, tokens] int32: slots of the whole group, as in SGLang's req_to_token.
        self.table = (order[..., None] * large + torch.arange(large)).flatten(1).int()
        self.tokens = torch.randn(len(lengths), self.table.shape[1], 576)
        self.caches = [self._filled(rank) for rank in range(size)]

    def on(self, rank: int) -> Group:
        self.parallel.dcp_rank = self.parallel.attn_dcp_rank = rank
        return self

    def _filled(self, rank: int) -> torch.Tensor:
        """The rows of a GPU, as SGLang writes them; NaN where it writes none."""
        self.on(rank)
        cache = torch.full(((int(self.table.max()) + 1) // self.size, 1, 576), torch.nan)
        for request, length in enumerate(self.lengths):
            self.write(cache, self.table[request, :length].long(), self.tokens[request, :length, None])
        cache[0] = torch.nan  # 0.5.17 writes there what other GPUs have
        return cache

    def write(self, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        name = "set_mla_kv_buffer_dcp_sharded_triton"  # of newer releases
        write = getattr(mla_buffer, name, None) or mla_buffer.set_mla_kv_buffer_triton
        write(cache, slots, rows[..., :512].contiguous(), rows[..., 512:].contiguous())

    def pool(self, rank: int) -> Any:
        cache = self.caches[rank]

        def set_mla_kv_buffer(layer: Any, slots: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor) -> None:
            self.on(rank).write(cache, slots, torch.cat([k, k_rope], dim=-1))

        return {"get_key_buffer": lambda layer_id: cache, "set_mla_kv_buffer": set_mla_kv_buffer}

    def attention(self, q: torch.Tensor, request: int, positions: list[int] | torch.Tensor) -> torch.Tensor:
        """[heads, 512] of q [heads, 576] over tokens of a request, in float64."""
        keys = self.tokens[request, positions].double()
        return (torch.softmax(q.double() @ keys.T * SCALE, -1) @ keys[:, :512]).float()


class Exchange:
    """SGLang's group of one GPU, which knows what the others send. After all have merged once, `sent` is complete."""

    def __init__(self, rank: int, lses: list[torch.Tensor], sent: dict[int, torch.Tensor]):
        self.world_size, self.rank_in_group, self.lses, self.sent = len(lses), rank, lses, sent

    def all_gather(self, own: torch.Tensor, dim: int) -> torch.Tensor:
        assert own.is_contiguous(), "NCCL sends memory as it lies"
        assert torch.equal(own, self.lses[self.rank_in_group])
        return torch.cat(self.lses, dim)

    def reduce_scatter_along_dim(self, own: torch.Tensor, dim: int) -> torch.Tensor:
        self.sent[self.rank_in_group] = own.clone()
        whole = torch.stack([self.sent.get(rank, own) for rank in range(self.world_size)]).sum(0)
        return whole.chunk(self.world_size, dim)[self.rank_in_group]

    def all_to_all_single(self, received: torch.Tensor, own: torch.Tensor) -> None:
        self.sent[self.rank_in_group] = own.clone()
        parts = [self.sent.get(rank, own).chunk(self.world_size) for rank in range(self.world_size)]
        received.copy_(torch.cat([part[self.rank_in_group] for part in parts]))


def merged(answers: list[Any], way: str) -> torch.Tensor:
    """[T, all heads, 512]: what SGLang's model code makes of the GPUs' (out, lse)."""
    ask = getattr(forward_mla, "is_mla_dcp_lse_base_on_e", None) or forward_mla._is_mla_dcp_lse_base_on_e
    base = ask(BACKEND_NAME)
    lses, sent = [lse for _, lse in answers], {}
    for _ in range(2):  # the second time with what every GPU sends
        parts = []
        for rank, (out, lse) in enumerate(answers):
            group, whole = Exchange(rank, lses, sent), out.view(len(out), -1, 512)
            if way == "a2a":
                part = comm.dcp_a2a_lse_reduce(whole.contiguous(), lse.contiguous(), group, is_lse_base_on_e=base)
            else:
                part = comm.cp_lse_ag_out_rs_mla(whole, lse, group, is_lse_base_on_e=base).transpose(0, 1)
            parts.append(part)
    return torch.cat(parts, dim=1)


def queries(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [tokens, heads, 576], its two parts as the model gathers them of every GPU: rope first, by head)."""
    gathered = torch.randn(heads, tokens, 64 + 512)
    q_rope, q_nope = (part.transpose(0, 1) for part in gathered.split([64, 512], dim=-1))
    return torch.cat([q_nope, q_rope], dim=-1), q_nope, q_rope


def layer(size: int) -> SimpleNamespace:
    """Of the decode phase: with the query heads of every GPU."""
    return SimpleNamespace(layer_id=0, tp_q_head_num=HEADS * size, head_dim=576, v_head_dim=512, scaling=SCALE)


def mla(group: Group, rank: int) -> Any:
    """Our backend of a model without an indexer, on a GPU of the group, with SGLang's metadata of a batch."""
    made = object.__new__(mla_backend.NsaPluginMLABackend)
    made.device, made.page_size = torch.device("cpu"), group.page_size
    made.share = shards.Share.of(group.on(rank).parallel)
    made.num_q_heads, made.decode_workspace, made.step = HEADS * group.size, None, Step()
    made.rows_are_fp8 = made.kv_is_finite = False
    made.position_scaling = query.PositionScaling(SimpleNamespace(hf_text_config=None))
    made.token_to_kv_pool = SimpleNamespace(**group.pool(rank))
    made.forward_metadata = SimpleNamespace(
        page_table=group.table[:, :: group.page_size] // group.page_size,
        cache_seqlens_int32=torch.tensor(group.lengths, dtype=torch.int32),
    )
    return made


def decode(group: Group, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a decode step answers, what it should), each request's last token being new."""
    last = torch.tensor(group.lengths) - 1
    request = torch.arange(len(last))
    q, q_nope, q_rope = queries(len(last), HEADS * group.size)
    new = torch.randn(len(last), 1, 576)
    group.tokens[request, last] = new[:, 0]
    batch = SimpleNamespace(out_cache_loc=group.table[request, last].long(), positions=last)
    answers = []
    for rank in range(group.size):
        backend = mla(group, rank)
        for _ in range(2):  # layers of one step
            k, k_rope = new[..., :512], new[..., 512:]
            out, lse = backend.forward_decode(q_nope, k, k, layer(group.size), batch, q_rope=q_rope, k_rope=k_rope)
        empty = torch.tensor(group.lengths) <= rank
        assert torch.equal(lse.isneginf().all(-1), empty), "a GPU without tokens of a request says so, and only it"
        assert not out[empty].any()
        answers.append((out, lse))
    want = torch.stack([group.attention(q[b], b, torch.arange(n)) for b, n in enumerate(group.lengths)])
    return merged(answers, way), want


@pytest.mark.parametrize(
    "size, page_size, way",
    [(2, 1, "a2a"), (2, 16, "ag_rs"), (2, 64, "a2a"), (4, 1, "ag_rs"), (4, 16, "a2a"), (4, 64, "ag_rs")],
)
def test_what_the_gpus_decode_is_merged_to_the_whole(
    size: int, page_size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, want = decode(Group(size, page_size, LENGTHS, monkeypatch), way)
    for row, expected in zip(out, want, strict=True):
        torch.testing.assert_close(row, expected, **CLOSE)


@pytest.mark.parametrize("mistake", ["natural lse", "another GPU's length", "the table of whole contexts"])
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would not notice would be no test."""
    if mistake == "natural lse":
        monkeypatch.setattr(shards, "LOG2_E", 1.0)
    elif mistake == "another GPU's length":
        monkeypatch.setattr(shards.Share, "lengths", lambda self, lengths: lengths // self.size)
    else:
        monkeypatch.setattr(shards.Share, "page_table", lambda self, table: table // self.size)
    out, want = decode(Group(2, 16, [130, 201], monkeypatch), "a2a")
    assert not torch.allclose(out, want, **CLOSE)


@pytest.mark.parametrize("way", ["a2a", "ag_rs"])
def test_a_vendors_answer_is_merged_however_it_lies(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 gives its lse head by head, FlashMLA rows with padded heads behind those of the model."""
    group, tokens, heads = Group(2, 1, LENGTHS, monkeypatch), 5, 2 * HEADS
    outs, lses = torch.randn(2, tokens, heads, 512), torch.randn(2, tokens, heads)
    padded = [torch.cat([out, torch.full((tokens, 4, 512), torch.nan)], dim=1)[:, :heads] for out in outs]
    by_head = [lse.T.contiguous().T for lse in lses]
    assert not by_head[0].is_contiguous()
    answers = []
    for rank in range(2):
        group.on(rank)
        answers.append(shards.answer(padded[rank], by_head[rank]))
    weights = torch.softmax(lses, dim=0)[..., None]
    torch.testing.assert_close(merged(answers, way), (outs * weights).sum(0), **CLOSE)


def test_a_share_is_every_nth_token() -> None:
    lengths = torch.arange(50, dtype=torch.int32)
    for size in (1, 2, 3, 8):
        for rank in range(size):
            counts = shards.Share(size, rank).lengths(lengths)
            assert counts.dtype == torch.int32
            assert counts.tolist() == [len(range(rank, n, size)) for n in lengths.tolist()]


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_absorbed_prefill_reads_what_was_gathered(
    dtype: torch.dtype, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model puts the prefixes of every GPU and then the batch's own tokens into one buffer, in each layer."""
    prefixes, extends = [4, 0, 130, 62], [3, 2, 1, 70]
    lengths = [p + n for p, n in zip(prefixes, extends, strict=True)]
    group = Group(2, page_size, lengths, monkeypatch)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    places = torch.full((sum(lengths),), -1, dtype=torch.int32)
    counts = [torch.tensor(c, dtype=torch.int32) for c in (extends, prefixes)]
    before = [c.cumsum(0).int() - c for c in counts]
    dcp_kernels.create_dcp_kv_indices[(len(lengths),)](
        starts, counts[0], before[0], counts[1], before[1], places, sum(prefixes), 2
    )
    whole = [group.tokens[b, :n].to(dtype) for b, n in enumerate(lengths)]
    request, position = torch.tensor([(b, i) for b, n in enumerate(lengths) for i in range(prefixes[b], n)]).T
    own = group.tokens[request, position][:, None]
    parts = [rows[:p] for rows, p in zip(whole, prefixes, strict=True)]
    parts += [rows[p:] for rows, p in zip(whole, prefixes, strict=True)]
    batch = SimpleNamespace(
        out_cache_loc=group.table[request, position].long(),
        positions=position,
        seq_lens_cpu=torch.tensor(lengths),
        attn_dcp_metadata=SimpleNamespace(dcp_kv_buffer=torch.cat(parts)[:, None], dcp_kv_indices=places),
    )
    backend = mla(group, 1)
    kept = backend.token_to_kv_pool, backend.forward_metadata, backend.page_size
    read = []

    def forward_extend(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save: bool, **rest: Any) -> str:
        assert not save, "it would write to what was gathered"
        rows, table = self.token_to_kv_pool.get_key_buffer(layer.layer_id), self.forward_metadata.page_table
        assert rows.dtype == torch.float32
        assert table.dtype == torch.int32
        assert table.shape == (len(lengths), max(lengths))
        slots = [table[b, :n, None] * self.page_size + torch.arange(self.page_size) for b, n in enumerate(lengths)]
        read.extend(rows[places.flatten()[:n].long(), 0] for places, n in zip(slots, lengths, strict=True))
        assert self.forward_metadata.cache_seqlens_int32 is kept[1].cache_seqlens_int32
        return "stock"

    monkeypatch.setattr(mla_backend.FlashAttentionBackend, "forward_extend", forward_extend)
    q = torch.randn(sum(extends), HEADS, 576)
    group.caches[1].fill_(torch.nan)
    taken = backend.forward_extend(
        q[..., :512].flatten(1), own[..., :512], None, layer(1), batch, q_rope=q[..., 512:], k_rope=own[..., 512:]
    )
    assert taken == "stock"
    for rows, expected in zip(read, whole, strict=True):
        torch.testing.assert_close(rows, expected.float(), rtol=0, atol=0)
    assert (backend.token_to_kv_pool, backend.forward_metadata, backend.page_size) == kept
    rows = group.caches[1][batch.out_cache_loc[batch.out_cache_loc % 2 == 1] // 2, 0]
    torch.testing.assert_close(rows, own[batch.out_cache_loc % 2 == 1, 0], rtol=0, atol=0)


@pytest.mark.skipif(not SPLITS_INDEXED, reason="this release does not split the tokens of models with an indexer")
@pytest.mark.parametrize(
    "size, mode, way", [(2, "DECODE", "ag_rs"), (4, "DECODE", "a2a"), (2, "EXTEND", "a2a"), (4, "EXTEND", "ag_rs")]
)
def test_what_the_gpus_attend_to_of_the_selected_tokens_is_merged(
    size: int, mode: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots of the whole group come from the indexer; every GPU has some of them, or none."""
    group = Group(size, 64, LENGTHS, monkeypatch)
    extends = [1] * len(LENGTHS) if mode == "DECODE" else [1, 2, 1, 3, 1, 5, 1, 2]
    request = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(extends))
    seen = [n - m + j + 1 for n, m in zip(LENGTHS, extends, strict=True) for j in range(m)]
    topk = 8
    before = [n - m for n, m in zip(LENGTHS, extends, strict=True)]
    written = group.table[request, torch.tensor(seen) - 1].long()
    batch = bare.batch(batch_info.ForwardMode[mode], before, extends, torch.tensor(LENGTHS), out_cache_loc=written)
    chosen = [torch.randperm(n)[:topk].tolist() for n in seen]
    slots = torch.full((len(seen), topk), -1, dtype=torch.int32)
    for row, picked in enumerate(chosen):
        slots[row, : len(picked)] = group.table[request[row], picked]
    q, q_nope, q_rope = queries(len(seen), HEADS * size)
    new = group.tokens[request, torch.tensor(seen) - 1][:, None]
    answers = []
    for rank in range(size):
        pages = bare.index_pages(int(group.table.max()) // 64 + 1)
        backend = bare.backend(dsa_backend.NsaPluginDSABackend, group.table, pages, topk, **group.pool(rank))
        backend.attention_workspace = backend.logits_buffer = None
        backend.share = shards.Share.of(group.on(rank).parallel)
        backend.init_forward_metadata(batch)
        forward = backend.forward_decode if mode == "DECODE" else backend.forward_extend
        k, k_rope = new[..., :512], new[..., 512:]
        out, lse = forward(q_nope, k, k, layer(size), batch, q_rope=q_rope, k_rope=k_rope, topk_indices=slots)
        nothing = torch.tensor([all(position % size != rank for position in picked) for picked in chosen])
        assert torch.equal(lse.isneginf().all(-1), nothing)
        answers.append((out, lse))
    for row, whole in enumerate(merged(answers, way)):
        torch.testing.assert_close(whole, group.attention(q[row], int(request[row]), chosen[row]), **CLOSE)


ARGUMENTS = {
    "attention_backend": BACKEND_NAME,
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "device": "cuda",
    "dcp_size": 2,
    "tp_size": 2,
}


@pytest.mark.parametrize("name", arguments.WITH_DECODE_CP)
def test_what_was_not_tried_beside_a_split_cache_is_refused(name: str) -> None:
    others = {"speculative_algorithm": "NEXTN", "lora_paths": ["a=b"], "disaggregation_mode": "prefill"}
    others["dcp_comm_backend"] = "fi_a2a"
    value = others.get(name, 2 if name.endswith("_size") else True)
    flag = "--" + name.replace("_", "-")
    launch.check_arguments(SimpleNamespace(**ARGUMENTS))
    with pytest.raises(ValueError, match=rf"^{flag} .* with --dcp-size 2: nsa_plugin .*Start with"):
        launch.check_arguments(SimpleNamespace(**ARGUMENTS, **{name: value}), as_given=True)
    launch.check_arguments(SimpleNamespace(**{**ARGUMENTS, "dcp_size": 1, name: value}))


@pytest.mark.parametrize("device", ["cpu", "rocm"])
def test_a_cache_is_split_on_nvidia_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_device_kind", lambda _: device)
    with pytest.raises(ValueError, match=rf"^--dcp-size 2 on {device}: .*NVIDIA GPUs only"):
        launch.check_arguments(SimpleNamespace(**ARGUMENTS))


def test_which_models_and_groups_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, indexed, sharing = bare.model(), bare.model(index_topk=2048), bare.model(index_topk=2048, index_topk_freq=2)
    check = launch.check_decode_context_parallel
    check(sharing, SimpleNamespace(tp_size=1))
    check(plain, SimpleNamespace(**ARGUMENTS))
    check(plain, SimpleNamespace(**{**ARGUMENTS, "tp_size": 8}))
    for size in (0, 3, 4):
        with pytest.raises(
            ValueError, match=rf"^--dcp-size {size} with --tp 2: expected a number of GPUs that divides"
        ):
            check(plain, SimpleNamespace(**{**ARGUMENTS, "dcp_size": size}))
    monkeypatch.setattr(release, "exists", lambda target: False)
    with pytest.raises(ValueError, match=r"^--dcp-size 2 with DeepseekV32ForCausalLM: SGLang .* Use SGLang 0\.5\.22"):
        check(indexed, SimpleNamespace(**ARGUMENTS))
    monkeypatch.setattr(release, "exists", lambda target: target == launch.SPLITS_ROWS_OF_INDEXED)
    check(indexed, SimpleNamespace(**ARGUMENTS))
    with pytest.raises(ValueError, match=r"^--dcp-size 2 with DeepseekV32ForCausalLM, whose layers share"):
        check(sharing, SimpleNamespace(**ARGUMENTS))


def test_sglang_does_not_choose_other_rows_than_ours() -> None:
    from sglang.srt.server_args import ServerArgs

    resolves_later = hasattr(ServerArgs, "resolve_once")
    args = ServerArgs(model_path="dummy") if resolves_later else SimpleNamespace(**launch._defaults(ServerArgs))
    launch._choose_for_split_cache(args)
    assert args.dsa_prefill_backend is None, "it is left to SGLang where no cache is split"
    args.dcp_size = args.tp_size = 2
    launch._choose_for_split_cache(args)
    assert (args.dcp_comm_backend, args.dcp_replicate_q_proj) in (("a2a", False), ("ag_rs", False))
    if SPLITS_INDEXED:
        overrides = importlib.import_module("sglang.srt.arg_groups.model_overrides.deepseek_v2")
        assert overrides._dsa_dcp_overrides(args) == {}
