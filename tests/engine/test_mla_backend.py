"""The GPU backend of MLA models without an indexer, on a CPU: which computation decodes, and into what."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin.engine import latent_rows, launch, query
from nsa_backend_plugin.engine.gpu import shards
from nsa_backend_plugin.ops import dense_mla, preferences
from nsa_backend_plugin.ops.arch import pretended
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.ops.dense_mla import fa3

pytest.importorskip("sglang", reason="needs SGLang")
if importlib.util.find_spec("sgl_kernel") is None:  # SGLang's FlashAttention backend imports it, and no CPU has it
    kernels = ModuleType("sgl_kernel")
    kernels.merge_state_v2 = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sgl_kernel", kernels)
        from nsa_backend_plugin.engine.gpu import mla_backend
else:
    from nsa_backend_plugin.engine.gpu import mla_backend

HEADS, PAGE = 3, 16
LENGTHS = [40, 1, 17]
LENGTH = list(enumerate(LENGTHS))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = object.__new__(mla_backend.NsaPluginMLABackend)
    made.device, made.page_size, made.num_q_heads = torch.device("cpu"), PAGE, HEADS
    made.decode_workspace, made.step, made.rows_are_fp8 = None, Step(), False
    made.share = shards.Share(1, 0)
    made.position_scaling = query.PositionScaling(SimpleNamespace(hf_text_config=None))
    made.latent = torch.randn(8 * PAGE, 1, 576)

    def set_mla_kv_buffer(layer: Any, slots: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        made.latent[slots] = torch.cat([k, k_rope], -1)

    made.token_to_kv_pool = SimpleNamespace(
        get_key_buffer=lambda layer_id: made.latent, set_mla_kv_buffer=set_mla_kv_buffer
    )
    table = torch.stack([torch.tensor([6, 2, 4]), torch.tensor([1, 1, 1]), torch.tensor([7, 3, 3])]).int()
    made.forward_metadata = SimpleNamespace(
        page_table=table, cache_seqlens_int32=torch.tensor(LENGTHS, dtype=torch.int32)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


LAYER = SimpleNamespace(tp_q_head_num=HEADS, v_head_dim=512, head_dim=576, layer_id=0, scaling=0.05)


#: Of queries at positions 39, 0 and 16, where the scale grows at every 16th.
SCALED = SimpleNamespace(llama_4_scaling={"beta": 0.5, "original_max_position_embeddings": 16})
FACTORS = 1 + 0.5 * torch.tensor([3.0, 1.0, 2.0]).log()


def decode(backend: Any, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of a step, what it should be). factors: of the queries, all 1 unless given."""
    requests = len(LENGTHS)
    q, q_rope = torch.randn(requests, HEADS * 512), torch.randn(requests, HEADS, 64)
    k, k_rope = torch.randn(requests, 1, 512), torch.randn(requests, 1, 64)
    table = backend.forward_metadata.page_table
    slots = [[int(table[b, i // PAGE]) * PAGE + i % PAGE for i in range(n)] for b, n in enumerate(LENGTHS)]
    positions = torch.tensor(LENGTHS) - 1
    batch = SimpleNamespace(out_cache_loc=torch.tensor([row[-1] for row in slots]), positions=positions)
    scales = torch.ones(requests) if factors is None else factors
    out = backend.forward_decode(q, k, k, LAYER, batch, q_rope=q_rope, k_rope=k_rope)
    want = []
    for b, row in enumerate(slots):
        keys = backend.latent[row, 0].double()
        whole = torch.cat([q[b].view(HEADS, 512), q_rope[b]], -1).double()
        scale = LAYER.scaling * scales[b]
        want.append((torch.softmax(whole @ keys.T * scale, -1) @ keys[:, :512]).flatten())
        assert torch.equal(keys[-1].float(), torch.cat([k[b, 0], k_rope[b, 0]]))
    return out, torch.stack(want).float()


def test_decode_is_the_operations(backend: Any) -> None:
    out, want = decode(backend)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_queries_are_scaled_by_position(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral-Large-3's, in decode and in the prefill that is SGLang's, whose rows padding may follow."""
    backend.position_scaling = query.PositionScaling(SimpleNamespace(hf_text_config=SCALED))
    out, want = decode(backend, FACTORS)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    taken = {}
    stock = mla_backend.FlashAttentionBackend

    def forward_extend(
        self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save: bool = True, q_rope: Any = None, **rest: Any
    ) -> str:
        taken.update(q=q, k=k, q_rope=q_rope, save=save, **rest)
        return "stock"

    monkeypatch.setattr(stock, "forward_extend", forward_extend)
    q, k, q_rope = torch.randn(3, HEADS * 192), torch.randn(3, 5), torch.randn(3, HEADS, 64)
    batch = SimpleNamespace(positions=torch.tensor([39, 0, 16, 0]))
    assert backend.forward_extend(q, k, k, LAYER, batch, False, q_rope=q_rope, k_rope="k_rope") == "stock"
    torch.testing.assert_close(taken["q"], q * FACTORS[:, None])
    torch.testing.assert_close(taken["q_rope"], q_rope * FACTORS[:, None, None])
    assert taken["k"] is k
    assert taken["save"] is False
    assert taken["k_rope"] == "k_rope"
    backend.forward_extend(q, k, k, LAYER, batch)
    assert taken["q_rope"] is None


def test_captured_steps_take_the_scratch_that_is_large_enough(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_workspace_bytes", lambda batch: 100 * batch)
    backend.decode_workspace = torch.empty(300, dtype=torch.uint8)
    assert backend._workspace(3) is None, "an eager step"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend._workspace(3) is backend.decode_workspace
    assert backend._workspace(4) is None


@pytest.fixture
def fp8_backend(backend: Any) -> Any:
    """As `backend`, with rows that SGLang's pool keeps as bytes and hands out as fp8."""
    raw = torch.randn(8 * PAGE, 1, 576).to(torch.float8_e4m3fn).view(torch.uint8)

    def set_mla_kv_buffer(layer: Any, slots: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        raw[slots] = torch.cat([k, k_rope], -1).to(torch.float8_e4m3fn).view(torch.uint8)

    backend.latent, backend.rows_are_fp8 = raw.view(torch.float8_e4m3fn), True
    backend.token_to_kv_pool.set_mla_kv_buffer = set_mla_kv_buffer
    return backend


def attention(backend: Any, q: torch.Tensor, request: int, length: int) -> torch.Tensor:
    """q [heads, 576] over the first rows of a request, as they lie in the pool."""
    table = backend.forward_metadata.page_table
    rows = [int(table[request, i // PAGE]) * PAGE + i % PAGE for i in range(length)]
    keys = backend.latent.double()[rows, 0]
    return (torch.softmax(q.double() @ keys.T * LAYER.scaling, -1) @ keys[:, :512]).flatten().float()


def test_decode_over_fp8_rows(fp8_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = len(LENGTHS)
    q, q_rope = torch.randn(requests, HEADS * 512), torch.randn(requests, HEADS, 64)
    k, k_rope = torch.randn(requests, 1, 512), torch.randn(requests, 1, 64)
    table = fp8_backend.forward_metadata.page_table
    ends = [int(table[b, (n - 1) // PAGE]) * PAGE + (n - 1) % PAGE for b, n in LENGTH]
    batch = SimpleNamespace(out_cache_loc=torch.tensor(ends), positions=torch.tensor(LENGTHS) - 1)
    promised = {}
    operation = mla_backend.dense_mla.decode
    monkeypatch.setattr(mla_backend.dense_mla, "decode", lambda *a, **kw: promised.update(kw) or operation(*a, **kw))
    out = fp8_backend.forward_decode(q, k, k, LAYER, batch, q_rope=q_rope, k_rope=k_rope)
    assert not promised["kv_is_finite"], "SGLang's conversion makes NaN of what is too large"
    whole = torch.cat([q.view(requests, HEADS, 512), q_rope], -1)
    want = torch.stack([attention(fp8_backend, whole[b], b, n) for b, n in LENGTH])
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    written = fp8_backend.latent.float()[ends, 0]
    assert torch.equal(written, torch.cat([k, k_rope], -1)[:, 0].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("fails", [False, True])
def test_absorbed_prefill_reads_its_own_pages_widened(
    fp8_backend: Any, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang widens all rows that it is given: it gets those of the batch only, and never the pool's."""
    pool, metadata = fp8_backend.token_to_kv_pool, fp8_backend.forward_metadata
    k, k_rope = torch.randn(2, 1, 512), torch.randn(2, 1, 64)
    slots = torch.tensor([4 * PAGE + 6, 4 * PAGE + 7])  # the last two tokens of the first request
    batch = SimpleNamespace(
        out_cache_loc=slots, positions=torch.tensor([38, 39]), seq_lens_cpu=torch.tensor(LENGTHS, dtype=torch.int64)
    )
    q, q_rope = torch.randn(2, HEADS * 512), torch.randn(2, HEADS, 64)
    whole = torch.cat([q.view(2, HEADS, 512), q_rope], -1)
    copies = []

    def forward_extend(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save: bool, **rest: Any) -> Any:
        assert not save, "it would write to the copy"
        if fails:
            raise RuntimeError("out of memory")
        rows, table = self.token_to_kv_pool.get_key_buffer(layer.layer_id), self.forward_metadata.page_table
        copies.append(rows)
        assert rows.dtype == torch.float32
        assert rows.shape == (6 * PAGE, 1, 576), "pages of 40, 1 and 17 tokens"
        assert self.forward_metadata.cache_seqlens_int32 is metadata.cache_seqlens_int32
        out = []
        for position, heads in zip(batch.positions.tolist(), whole, strict=True):
            used = [int(table[0, i // PAGE]) * PAGE + i % PAGE for i in range(position + 1)]
            keys = rows[used, 0]
            out.append((torch.softmax(heads @ keys.T * layer.scaling, -1) @ keys[:, :512]).flatten())
        for row, (_, length) in enumerate(LENGTH):
            used = [int(table[row, i // PAGE]) * PAGE + i % PAGE for i in range(length)]
            there = [int(metadata.page_table[row, i // PAGE]) * PAGE + i % PAGE for i in range(length)]
            assert torch.equal(rows[used], fp8_backend.latent.float()[there])
        return torch.stack(out)

    monkeypatch.setattr(mla_backend.FlashAttentionBackend, "forward_extend", forward_extend)
    arguments = (q, k, k, LAYER, batch)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            fp8_backend.forward_extend(*arguments, q_rope=q_rope, k_rope=k_rope)
    else:
        for _ in range(2):  # layers of one step, which share the pages
            out = fp8_backend.forward_extend(*arguments, q_rope=q_rope, k_rope=k_rope)
        want = torch.stack([attention(fp8_backend, whole[i], 0, 39 + i) for i in range(2)])
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
        assert len(copies) == 2
    assert fp8_backend.token_to_kv_pool is pool
    assert fp8_backend.forward_metadata is metadata


def test_dense_prefill_over_fp8_rows_is_stocks(fp8_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        mla_backend.FlashAttentionBackend,
        "forward_extend",
        lambda self, *arguments, **keywords: seen.append((self.token_to_kv_pool, arguments, keywords)),
    )
    q, batch = torch.randn(3, HEADS * 192), SimpleNamespace(positions=torch.tensor([0, 1, 2]))
    fp8_backend.forward_extend(q, q, q, LAYER, batch, False)
    [(pool, arguments, keywords)] = seen
    assert pool is fp8_backend.token_to_kv_pool
    assert arguments[0] is q
    assert keywords == {}


@pytest.mark.parametrize(
    "kv, model, device, message",
    [
        (torch.bfloat16, torch.bfloat16, "cuda", None),
        (torch.float8_e4m3fn, torch.bfloat16, "cuda", None),
        (torch.float8_e4m3fn, torch.float16, "cuda", None),
        (torch.float8_e4m3fn, torch.float32, "cpu", None),
        (torch.float8_e4m3fn, torch.float32, "cuda", "fp8_e4m3 with --dtype torch.float32: .* bfloat16 or float16"),
        (torch.float8_e5m2, torch.bfloat16, "cuda", "--kv-cache-dtype torch.float8_e5m2: .* or in fp8_e4m3"),
        (torch.bfloat16, torch.float16, "cuda", "--kv-cache-dtype torch.bfloat16: .* torch.float16, or in fp8_e4m3"),
    ],
)
def test_rows_that_are_kept(kv: torch.dtype, model: torch.dtype, device: str, message: str | None) -> None:
    if message is None:
        latent_rows.check_plain(kv, model, device)
    else:
        with pytest.raises(ValueError, match=message):
            latent_rows.check_plain(kv, model, device)


def test_drafts_over_fp8_rows_are_refused() -> None:
    """Those of a model with an indexer are other rows."""
    plain = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]))
    launch.check_kv_cache(plain, "fp8_e4m3", None)
    launch.check_kv_cache(plain, "auto", "EAGLE")
    with pytest.raises(ValueError, match=r"EAGLE with --kv-cache-dtype fp8_e4m3: .* never run"):
        launch.check_kv_cache(plain, "fp8_e4m3", "EAGLE")
    indexed = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV32ForCausalLM"], index_topk=2048))
    launch.check_kv_cache(indexed, "fp8_e4m3", "EAGLE")


def test_unknown_keywords_are_refused(backend: Any) -> None:
    with pytest.raises(ValueError, match="SGLang passes sinks to the attention backend"):
        backend.forward_decode(None, None, None, LAYER, None, sinks=torch.zeros(HEADS))


def test_every_set_of_metadata_has_a_step_of_its_own(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first layer makes serves the others, until SGLang makes other metadata: eagerly or for a graph."""
    steps: list[Step] = []
    operation = mla_backend.dense_mla.decode

    def recording(*args: Any, step: Step, **kwargs: Any) -> torch.Tensor:
        assert kwargs["rows_have_keys"]
        assert kwargs["kv_is_finite"]
        steps.append(step)
        return operation(*args, step=step, **kwargs)

    monkeypatch.setattr(mla_backend.dense_mla, "decode", recording)
    stock = mla_backend.FlashAttentionBackend
    monkeypatch.setattr(stock, "init_forward_metadata", lambda self, batch: None)
    monkeypatch.setattr(stock, "init_forward_metadata_out_graph", lambda self, batch, in_capture=False: None)
    for renew in (lambda: None, lambda: backend.init_forward_metadata("batch")):
        renew()
        decode(backend)
        decode(backend)
    backend.init_forward_metadata_out_graph("batch", in_capture=True)
    decode(backend)
    assert steps[0] is steps[1]
    assert steps[2] is steps[3]
    assert len({id(step) for step in steps}) == 3


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_pool_whose_memory_may_be_given_back_is_not_promised_to_be_finite(
    sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_backend.FlashAttentionBackend, "__init__", lambda self, runner: None)
    monkeypatch.setattr(mla_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dcp_size=1))
    runner = SimpleNamespace(
        page_size=64,
        dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        model_config=SimpleNamespace(hf_text_config=None, num_attention_heads=HEADS),
        server_args=SimpleNamespace(enable_memory_saver=sleeps, speculative_algorithm=None),
    )
    assert mla_backend.NsaPluginMLABackend(runner).kv_is_finite is not sleeps


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads, batch", [(32, 32), (64, 8), (128, 8), (128, 128)])
def test_many_heads_are_fa3s_on_hopper(heads: int, batch: int, page_size: int) -> None:
    """It is up to 2.7 times faster than Triton there, at any page size (benchmarks: cutlass_mla)."""
    with pretended("sm_90") as device:
        q = torch.empty(batch, heads, 576, dtype=torch.bfloat16, device=device)
        table = torch.empty(batch, 8192 // page_size, dtype=torch.int32, device=device)
        kv = torch.empty(batch * 8192, 1, 576, dtype=torch.bfloat16, device=device)
        arguments = (q, kv, table, table[:, 0], 1.0)
        call = dense_mla.decode.call(*arguments, page_size=page_size, rows_have_keys=True, kv_is_finite=True)
    row = preferences.applying("dense_mla.decode", "sm_90", call.facts)
    assert preferences.TABLE[row].order[0] == "fa3"
    assert fa3.declines_decode(call) is None
