"""The adapters' calls against every recorded signature of AITER, the fakes against the target's, and doctor."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin.commands import doctor
from nsa_backend_plugin.ops._vendor import aiter_contract
from tests.ops import fake_aiter, fake_aiter_attention
from tests.rocm import fake_logits
from tests.rocm.aiter_signatures import RECORDED

FAKES = {
    call.function: getattr(module, call.function)
    for call in aiter_contract.CALLS
    for module in (fake_aiter, fake_aiter_attention, fake_logits)
    if hasattr(module, call.function)
}
CALLS = {call.function: call for call in aiter_contract.CALLS}
TARGET = RECORDED[aiter_contract.TARGET]


@pytest.mark.parametrize("name", CALLS)
def test_the_call_fits_the_signature_it_is_written_for(name):
    assert aiter_contract.mismatches(CALLS[name], aiter_contract.recorded_signature(TARGET[name])) == []


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_has_the_recorded_signature(name):
    fake = inspect.signature(FAKES[name])
    recorded = aiter_contract.recorded_signature(TARGET[name])
    assert list(fake.parameters) == list(recorded.parameters)
    for parameter, expected in zip(fake.parameters.values(), recorded.parameters.values(), strict=True):
        assert (parameter.default is parameter.empty) == (expected.default is expected.empty), parameter


@pytest.mark.parametrize(
    "version, name, reason",
    [
        ("2025 (mla_decode_fwd: commit 986eb25)", "mla_decode_fwd", "no parameter work_meta_data"),
        ("2025 (mla_decode_fwd: commit 986eb25)", "get_mla_metadata_v1", "argument 5 is missing"),
        ("2025 (mla_decode_fwd: commit 986eb25)", "deepgemm_fp8_paged_mqa_logits", "no parameter Preshuffle"),
        ("before preshuffle (aiter pull request 2879)", "indexer_k_quant_and_cache", "no parameter preshuffle"),
        ("before preshuffle (aiter pull request 2879)", "cp_gather_indexer_k_quant_cache", "no parameter preshuffle"),
        (
            "before preshuffle (aiter pull request 2879)",
            "get_mla_metadata_v1",
            "argument 2 is num_heads_per_head_k, expected kv_last_page_lens",
        ),
        ("before preshuffle (aiter pull request 2879)", "fused_qk_rope_cat_and_cache_mla", "no parameter apply_scale"),
        ("with split query dtypes", "get_mla_metadata_v1", "no parameter dtype_q"),
        ("with split query dtypes", "fused_qk_rope_cat_and_cache_mla", None),
        ("with split and joint query dtypes", "get_mla_metadata_v1", None),
        ("newer main (mla_decode_fwd: commit 000edf3)", "mla_decode_fwd", None),
        ("newer main (mla_decode_fwd: commit 000edf3)", "deepgemm_fp8_paged_mqa_logits", None),
    ],
)
def test_other_versions_are_told_apart(version, name, reason):
    signature = aiter_contract.recorded_signature(RECORDED[version][name])
    found = aiter_contract.mismatches(CALLS[name], signature)
    assert (found == []) if reason is None else any(reason in line for line in found), found


def test_a_new_required_parameter_and_open_signatures_are_mismatches():
    call = CALLS["cp_gather_indexer_k_quant_cache"]
    signature = aiter_contract.recorded_signature(TARGET[call.function].replace("preshuffle=", "stream preshuffle="))
    assert "parameter stream is required and not passed" in aiter_contract.mismatches(call, signature)[0]
    assert "cannot be checked" in aiter_contract.mismatches(call, inspect.signature(lambda *args: None))[0]


def _installed(**changes):
    functions = {**FAKES, **changes}
    return lambda module: SimpleNamespace(
        **{c.function: functions[c.function] for c in CALLS.values() if c.module == module and functions[c.function]}
    )


def test_the_installed_package_is_compared():
    assert aiter_contract.check_installed(_installed()) == []
    [line] = aiter_contract.check_installed(_installed(mla_decode_fwd=None))
    assert line.startswith("aiter.mla.mla_decode_fwd: AttributeError")


def test_operators_of_torch_are_compared_by_their_schema():
    """AITER's `torch_compile_guard` registers an operator and returns a wrapper without a signature."""
    name = "cp_gather_indexer_k_quant_cache"

    def wrapper_custom(*args, **kwargs):
        raise AssertionError("doctor compares, it does not call")

    [line] = aiter_contract.check_installed(_installed(**{name: wrapper_custom}))
    assert "takes anything, so its parameters cannot be checked" in line
    parameters = "Tensor(a!) kv_cache, Tensor(b!) dst_k, Tensor(c!) dst_scale, Tensor block_table, Tensor cu_seq_lens"
    for more, expected in ((", bool preshuffle=False", []), ("", ["has no parameter preshuffle"])):
        with torch.library._scoped_library("aiter", "FRAGMENT") as library:
            library.define(f"{name}({parameters}{more}) -> ()")
            found = aiter_contract.check_installed(_installed(**{name: wrapper_custom}))
        assert [line.split(": ")[1] for line in found] == expected


def test_doctor_reports_mismatches_on_rocm_hosts_only(monkeypatch):
    monkeypatch.setattr(aiter_contract, "check_installed", lambda: ["aiter.f: has no parameter x"])
    problems = doctor.Problems()
    for versions, device in (({"aiter": "0.1"}, {"arch": "sm_90"}), ({"aiter": None}, {"arch": "gfx942"})):
        assert doctor.aiter_contract(versions, device, problems) is None
    assert problems == []
    assert doctor.aiter_contract({"aiter": "0.1"}, {"arch": "gfx942"}, problems) == ["aiter.f: has no parameter x"]
    [problem] = problems
    assert "AITER 0.1 differs from main 2026-08-22: aiter.f: has no parameter x" in problem["problem"]
