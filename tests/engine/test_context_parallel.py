"""Prefill context parallelism: SGLang's split of a batch over GPUs into our attention, its GPUs one after the other.

Its collectives and streams are CUDA's, so that no CPU runs its servers: here rows are put together by hand. What
two GPUs answer is in test_gpu_parallel.py.
"""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import arguments, launch
from nsa_backend_plugin.ops import indexer_prep, mqa_logits, topk
from nsa_backend_plugin.ops.call import Step
from tests.engine import bare

pytest.importorskip("sglang", reason="needs SGLang")
dsa_backend = pytest.importorskip("nsa_backend_plugin.engine.gpu.dsa_backend")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
stock = pytest.importorskip("sglang.srt.layers.attention.dsa_backend")
stock_utils = pytest.importorskip("sglang.srt.layers.attention.dsa.utils")
batch_info = pytest.importorskip("sglang.srt.model_executor.forward_batch_info")
cp_base = pytest.importorskip("sglang.srt.layers.cp.base")
cp_utils = pytest.importorskip("sglang.srt.layers.cp.utils")
interleave = pytest.importorskip("sglang.srt.layers.cp.interleave")

HEADS, TOPK, WIDTH, SCALE = 4, 8, 192, 0.1
LAYER = SimpleNamespace(layer_id=0, tp_q_head_num=HEADS, head_dim=576, v_head_dim=512, scaling=SCALE)
#: Tokens of each request: in the cache, and in this batch. Some GPUs get none of a short request.
BATCHES = {
    "one prompt": ([0], [37]),
    "a chunk behind others": ([101], [40]),
    "several, of which short ones": ([0, 64, 127, 3], [1, 70, 2, 30]),
    "a token for each GPU": ([5], [4]),
    "no tokens to pad": ([0, 9], [25, 39]),
}


class Gpus:
    """A batch on the GPUs of a group, of which one is `rank` at a time."""

    def __init__(self, size: int, prefixes: list[int], extends: list[int], monkeypatch: pytest.MonkeyPatch):
        self.parallel = SimpleNamespace(
            attn_cp_size=size,
            attn_cp_rank=0,
            attn_cp_group=None,
            attn_dp_rank=0,
            cp_strategy="interleave",
            dsa_prefill_cp_mode="round-robin-split",
            enable_prefill_context_parallel=False,
            enable_cp_tp_group_sharing=False,
        )
        for name in ("cp.base", "cp.interleave", "cp.padding", "cp.utils", "utils.cp_utils", "attention.dsa.utils"):
            module = importlib.import_module(f"sglang.srt.layers.{name}")
            monkeypatch.setattr(module, "get_parallel", lambda: self.parallel, raising=False)
        self.strategy = interleave.InterleaveCPStrategy(cp_size=size)
        monkeypatch.setattr(cp_base, "_STRATEGY", self.strategy)
        monkeypatch.setenv("SGLANG_ENABLE_CP_V2", "1")  # up to 0.5.19, as its servers set it
        monkeypatch.setattr(stock_utils, "is_dsa_enable_prefill_cp", lambda: True)
        monkeypatch.setattr(interleave, "use_symmetric_memory", lambda *a, **k: contextlib.nullcontext())
        monkeypatch.setattr(interleave, "is_allocation_symmetric", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self.prefixes, self.extends = prefixes, extends
        lengths = torch.tensor(prefixes) + torch.tensor(extends)
        self.request = torch.repeat_interleave(torch.arange(len(extends)), torch.tensor(extends))
        #: Of every token of the batch, in order.
        self.visible = [p + j + 1 for p, n in zip(prefixes, extends, strict=True) for j in range(n)]
        self.positions = torch.tensor(self.visible) - 1
        pages = torch.randperm(3 * len(extends)).view(-1, 3)
        self.table = (pages[..., None] * 64 + torch.arange(64)).flatten(1).int()
        self.latents = torch.randn(pages.numel() * 64, 1, 576)
        self.index_pages = bare.index_pages(pages.numel())
        slots = self.table[self.request, self.positions].long()
        extend = batch_info.ForwardMode.EXTEND
        self.batch = bare.batch(extend, prefixes, extends, lengths, out_cache_loc=slots)
        assert cp_active()(self.batch)
        cp_utils.prepare_cp_forward(self.batch)

    def on(self, rank: int) -> Gpus:
        self.parallel.attn_cp_rank = rank
        return self

    def local(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the batch that this GPU computes, padded, as the model gets them."""
        return self.strategy.shard_hidden_states(rows, self.batch)

    def gathered(self, k: torch.Tensor, k_rope: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
        """What the model hands to the backend of this GPU, of every GPU's rows."""
        rank, rows = self.parallel.attn_cp_rank, torch.cat([k, k_rope], dim=-1)[:, 0]

        def all_gather(out: torch.Tensor, own: torch.Tensor) -> None:
            parts = [self.on(other).local(rows) for other in range(self.parallel.attn_cp_size)]
            assert torch.equal(own, self.on(rank).local(rows))
            out.copy_(torch.cat(parts))

        monkeypatch.setattr(interleave, "attn_cp_all_gather_into_tensor", all_gather)
        return self.strategy.materialize_full_mla_kv(self.batch, LAYER, self.local(k), self.local(k_rope))

    def backend(self, cache: torch.Tensor) -> Any:
        """Ours, with just enough of a pool for SGLang's metadata of a prefill."""

        def write(layer: Any, slots: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor) -> None:
            cache[slots] = torch.cat([k, k_rope], dim=-1)

        rows = {"get_key_buffer": lambda layer_id: cache, "set_mla_kv_buffer": write}
        made = bare.backend(dsa_backend.NsaPluginDSABackend, self.table, self.index_pages, TOPK, **rows)
        made.attention_workspace = made.logits_buffer = None
        return made


def cp_active() -> Any:
    """SGLang's own word, which has another name in older releases."""
    return getattr(cp_utils, "is_cp_active", None) or cp_utils.is_cp_v2_active


class Case:
    """Queries and keys of a batch, and what a loop over its tokens selects and answers."""

    def __init__(self, gpus: Gpus):
        tokens = len(gpus.visible)
        self.q = torch.randn(tokens, HEADS, 576)
        self.k, self.k_rope = torch.randn(tokens, 1, 512), torch.randn(tokens, 1, 64)
        self.index_q, self.gate = torch.randn(tokens, HEADS, 128), torch.rand(tokens, HEADS)
        self.cos_sin = torch.randn(WIDTH, 64)
        self.indexer = bare.indexer(self.cos_sin, HEADS, TOPK)
        self.cache = gpus.latents.clone()
        self.cache[gpus.batch.out_cache_loc] = torch.cat([self.k, self.k_rope], dim=-1)

    def slots(self, gpus: Gpus, token: int) -> list[int]:
        table, length = gpus.table[gpus.request[token]], torch.tensor([gpus.visible[token]], dtype=torch.int32)
        query, weights = indexer_prep.query(
            self.index_q[token : token + 1],
            self.gate[token : token + 1],
            gpus.positions[token : token + 1],
            self.cos_sin,
            weight_scale=HEADS**-0.5,
            is_neox=True,
        )
        pages = (table[::64] // 64)[None]
        logits = mqa_logits.paged(query[:, None], gpus.index_pages, weights, length, pages, WIDTH)
        best = topk.select(logits, length, TOPK)[0]
        return sorted(table[best[best >= 0].long()].tolist())

    def answer(self, token: int, slots: list[int]) -> torch.Tensor:
        rows = self.cache[slots, 0].double()
        weights = (self.q[token].double() @ rows.T * SCALE).softmax(-1)
        return (weights @ rows[:, :512]).float()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_each_gpu_attends_for_its_tokens_to_all_before_them(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(size, *BATCHES[name], monkeypatch)
    case = Case(gpus)
    answered: set[int] = set()
    for rank in range(size):
        cache = gpus.latents.clone()
        backend = gpus.on(rank).backend(cache)
        backend.init_forward_metadata(gpus.batch)
        own = range(rank, len(gpus.visible), size)
        rows = dsa_backend.prefill_rows(backend.forward_metadata)
        assert rows.lengths.tolist() == [gpus.visible[token] for token in own]
        check_what_stocks_indexer_reads(backend.forward_metadata, rows)
        check_what_it_selects(backend, gpus.batch, rows)
        # The model's rows are padded behind these, which are all that an indexer selects for.
        query, gate, positions = (x[rank::size] for x in (case.index_q, case.gate, gpus.positions))
        slots = indexer_path.select_slots(case.indexer, query, gate, positions, backend.token_to_kv_pool, rows)
        q = gpus.local(case.q)
        assert q.shape[0] >= slots.shape[0]
        k, k_rope = gpus.gathered(case.k, case.k_rope, monkeypatch)
        out = backend.forward_extend(
            q[..., :512].flatten(1),
            k,
            k,
            LAYER,
            gpus.batch,
            q_rope=q[..., 512:],
            k_rope=k_rope,
            topk_indices=slots,
        )
        assert torch.equal(cache, case.cache), "a GPU has not written every token of the batch"
        assert out.shape == (q.shape[0], HEADS * 512)
        assert not out[len(own) :].any(), "a row that pads the batch has an answer"
        for row, token in enumerate(own):
            want = case.slots(gpus, token)
            assert sorted(slot for slot in slots[row].tolist() if slot >= 0) == want
            torch.testing.assert_close(out[row].view(HEADS, 512), case.answer(token, want), rtol=1e-4, atol=1e-4)
        answered |= set(own)
    assert answered == set(range(len(gpus.visible)))


def check_what_stocks_indexer_reads(metadata: Any, rows: Any) -> None:
    """On CUDA SGLang's own indexer selects: by ranges of gathered keys, and by requests that it counts rows for."""
    starts = (rows.seq_lens.cumsum(0) - rows.seq_lens)[rows.request.long()]
    first, last = metadata.indexer_k_start_end
    assert torch.equal(first, starts.int())
    assert torch.equal(last, (starts + rows.lengths).int())
    assert torch.equal(rows.request.bincount(), metadata.cu_seqlens_q.diff())


def check_what_it_selects(backend: Any, batch: Any, rows: Any) -> None:
    """A row of the logits: of a whole batch, of a chunk of them, and where every token sees less than the top-k."""
    metadata = backend.get_indexer_metadata(0, batch)
    first, last = metadata.get_indexer_kvcache_range()
    logits = torch.randn(len(first), int(rows.seq_lens.sum()))
    want = []
    for row, begin, end, request in zip(logits, first, last, rows.request, strict=True):
        best = row[begin:end].topk(min(TOPK, end - begin)).indices
        want.append(sorted((rows.page_table[request, best // 64] * 64 + best % 64).tolist()))

    def selected(found: torch.Tensor) -> list[list[int]]:
        return [sorted(slot for slot in row if slot >= 0) for row in found.tolist()]

    hidden = torch.arange(logits.shape[1]) < first[:, None]
    logits[hidden | (torch.arange(logits.shape[1]) >= last[:, None])] = torch.nan  # what DeepGEMM leaves there
    assert selected(metadata.topk_transform(logits, TOPK, ks=first)) == want
    middle = len(first) // 2
    for part in (slice(middle), slice(middle, None)):
        found = metadata.topk_transform(
            logits[part],
            TOPK,
            ks=first[part],
            cu_seqlens_q=torch.ones_like(first[part]),
            ke_offset=metadata.get_seqlens_expanded()[part],
            batch_idx_list=metadata.get_token_to_batch_idx()[part],
            topk_indices_offset_override=None,
        )
        assert selected(found) == want[part]
    whole = metadata.topk_transform(torch.zeros(len(first), WIDTH), WIDTH)
    tables = zip(rows.page_table[rows.request.long()], rows.lengths, strict=True)
    assert selected(whole) == [
        sorted((pages[:, None] * 64 + torch.arange(64)).flatten()[:length].tolist()) for pages, length in tables
    ]


def test_a_batch_with_fewer_tokens_than_gpus_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU computes it then; SGLang 0.5.17 has padded lengths that the batch has no rows for."""
    gpus = Gpus(4, [5], [4], monkeypatch)
    gpus.batch.extend_seq_lens_cpu = [3]
    assert not cp_active()(gpus.batch)
    backend = gpus.backend(gpus.latents)
    lengths = torch.tensor([6, 7, 8, 0], dtype=torch.int32)
    backend.forward_metadata = SimpleNamespace(dsa_cache_seqlens_int32=lengths, dsa_seqlens_expanded=lengths[:3])
    backend.step = Step()
    assert backend._selected(3, gpus.batch) is None
    assert backend._selected(4, gpus.batch) is lengths


ARGUMENTS = {
    "attention_backend": BACKEND_NAME,
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "device": "cuda",
    "enable_prefill_cp": True,
    "cp_strategy": "interleave",
    "attn_cp_size": 2,
    "tp_size": 2,
}


@pytest.mark.parametrize("name", arguments.WITH_PREFILL_CP)
def test_what_was_not_tried_beside_a_split_prefill_is_refused(name: str) -> None:
    others = {"speculative_algorithm": "NEXTN", "lora_paths": ["a=b"], "disaggregation_mode": "prefill"}
    value = others.get(name, 2 if name.endswith("_size") else True)
    flag = "--" + name.replace("_", "-")
    launch.check_arguments(SimpleNamespace(**ARGUMENTS))
    with pytest.raises(ValueError, match=rf"^{flag} .* with --enable-prefill-cp: nsa_plugin .*Start without"):
        launch.check_arguments(SimpleNamespace(**ARGUMENTS, **{name: value}), as_given=True)
    launch.check_arguments(SimpleNamespace(**{**ARGUMENTS, "enable_prefill_cp": False, name: value}))


@pytest.mark.parametrize("device", ["cpu", "rocm"])
def test_prefill_is_split_on_nvidia_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_device_kind", lambda _: device)
    with pytest.raises(ValueError, match=rf"^--enable-prefill-cp True on {device}: .*NVIDIA GPUs only"):
        launch.check_arguments(SimpleNamespace(**ARGUMENTS))


def test_only_models_with_an_indexer_and_whole_requests_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    indexed, plain = bare.model(index_topk=2048), bare.model()
    launch.check_context_parallel(indexed, SimpleNamespace(**ARGUMENTS))
    launch.check_context_parallel(plain, SimpleNamespace(attn_cp_size=1))
    with pytest.raises(ValueError, match=r"^--enable-prefill-cp with DeepseekV3ForCausalLM: .*indexer only"):
        launch.check_context_parallel(plain, SimpleNamespace(**ARGUMENTS))
    with pytest.raises(ValueError, match=r"^--attn-cp-size 2 without --enable-prefill-cp: .*Add --enable-prefill-cp"):
        launch.check_context_parallel(indexed, SimpleNamespace(attn_cp_size=2))
    with pytest.raises(ValueError, match=r"^--attn-cp-size 2 with --tp 4: .*Make the two equal"):
        launch.check_context_parallel(indexed, SimpleNamespace(**{**ARGUMENTS, "tp_size": 4}))
    sharing = bare.model(index_topk=2048, index_topk_freq=2)
    with pytest.raises(ValueError, match=r"^--enable-prefill-cp with DeepseekV32ForCausalLM, whose layers share"):
        launch.check_context_parallel(sharing, SimpleNamespace(**ARGUMENTS))
    older = SimpleNamespace(**ARGUMENTS, enable_dsa_prefill_context_parallel=True)
    for value, refused in (("", False), ("1", False), ("False", True)):
        monkeypatch.setenv("SGLANG_ENABLE_CP_V2", value)
        launch.check_context_parallel(indexed, SimpleNamespace(**ARGUMENTS))  # newer releases do not read it
        context: Any = pytest.raises(ValueError, match=r"^SGLANG_ENABLE_CP_V2=False with --enable-prefill-cp: .*Unset")
        with context if refused else contextlib.nullcontext():
            launch.check_context_parallel(indexed, older)


def test_an_older_release_is_told_that_the_model_has_an_indexer() -> None:
    """SGLang 0.5.17 to 0.5.19 would take another backend's name for that of a model without one."""
    from sglang.srt.server_args import ServerArgs

    def told(**given: Any) -> Any:
        args = SimpleNamespace(enable_dsa_prefill_context_parallel=False, **given)
        launch._split_indexers_prefill(args)
        return args.enable_dsa_prefill_context_parallel

    assert told(enable_prefill_cp=True, cp_strategy="interleave")
    assert not told(enable_prefill_cp=True, cp_strategy=None)  # SGLang's own error
    assert not told(enable_prefill_cp=False, cp_strategy=None)
    launch._split_indexers_prefill(newer := SimpleNamespace(enable_prefill_cp=True, cp_strategy="interleave"))
    assert not hasattr(newer, "enable_dsa_prefill_context_parallel")
    handler = getattr(ServerArgs, "_handle_legacy_cp_arguments", None)
    if handler is None:
        return
    args = SimpleNamespace(**ARGUMENTS, prefill_cp_mode="in-seq-split", dsa_prefill_cp_mode="round-robin-split")
    args.enable_prefill_context_parallel = args.enable_dsa_prefill_context_parallel = False
    args._resolved = lambda: args
    launch._split_indexers_prefill(args)
    handler(args)
    assert (args.enable_prefill_context_parallel, args.enable_dsa_prefill_context_parallel) == (False, True)
    assert (args.cp_strategy, args.dsa_prefill_cp_mode) == ("interleave", "round-robin-split")
