"""Every supported release has what the plugin reaches into; each argument, variable and architecture has its class.

The names come from the wheels (`tools/wheels.py`); what real servers say is in tests/engine/test_refusals.py.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import arguments, contract, inspection, launch
from nsa_backend_plugin.engine import release as sglang_release
from tests.sglang_copies import overlay
from tools import wheels

RULES = {**arguments.REFUSED, **{n: r for rules in arguments.ON_DEVICE.values() for n, r in rules.items()}}
CLASSES = {
    "refused": set(arguments.REFUSED),
    "served": set(arguments.SERVED),
    **{subject: set(names.split()) for subject, names in arguments.NO_CONCERN.items()},
}


@pytest.fixture(scope="module", params=sglang_release.RELEASES)
def package(request):
    return wheels.package(request.param)


def test_a_release_has_what_the_plugin_reaches_into_and_nothing_that_is_not_classified(package):
    assert [finding.what for finding in inspection.findings(package)] == []


def test_what_is_read_of_a_release_is_there(package, tmp_path):
    assert len(sglang_release.server_arguments(package)) > 400
    assert {"SGLANG_DSA_FUSE_TOPK", "SGLANG_DSA_TOPK_BROADCAST"} <= sglang_release.dsa_variables(package)
    architectures = {"DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM", "KimiLinearForCausalLM"}
    assert architectures <= sglang_release.mla_architectures(package)
    assert len(list(contract.missing(tmp_path))) == sum(len(p.__annotations__) for p in contract.CLASSES)


def test_a_server_that_asks_for_nothing_is_served_in_a_release(package):
    """The default of every argument that may be refused; 0.5.21 and 0.5.22 turn one off with different values."""
    defaults = sglang_release.server_arguments(package)
    served = {name: rule.served for name, rule in arguments.REFUSED.items()}
    served["disaggregation_decode_host_receive_threshold"] = (arguments.host_receive_off(package),)
    assert {n: v for n, v in defaults.items() if n in served and v is not ... and v not in served[n]} == {}
    assert defaults["pp_size"] == 1


def test_what_a_releases_hierarchical_cache_does_to_drafts(package):
    name, fault = package.parent.name, sglang_release.hicache_draft_fault(package)  # the wheel's folder has the name
    if name == "0.5.23":
        assert fault is None
    else:
        assert ("issue 32176" if name == "0.5.17" else "while the verification in flight") in fault


#: File of the newest release: (what a next one may change there, into what, where the plugin says otherwise, how).
CHANGES = {
    "srt/models/deepseek_common/attention_forward_methods/forward_mla.py": (
        "def forward_absorb_prepare(", "def renamed(", "ledger.py", "fused_decode: .*absorb_prepare is not there",
    ),
    "srt/managers/tokenizer_manager.py": (
        "input_ids", "tokens", "ledger.py", r"vocabulary: .* has the parameters \(self, obj, tokens\), requests:",
    ),
    "srt/layers/radix_attention.py": (
        "self.scaling", "self.scale", "contract.py", r".*\.RadixAttention\.scaling is not set",
    ),
    "srt/layers/quantization/fp8_utils.py": (
        "def block_quant_dequant(", "def dequant(", "linear.py", r".*\.block_quant_dequant is not there to be imported",
    ),
    "srt/arg_groups/fields/lora.py": (
        "    enable_lora:", "    brand_new: int = 1\n    enable_lora:", "arguments.py", "argument brand_new is not",
    ),
    "srt/configs/model_config.py": (
        "MiniCPM3For", "BrandNewFor", "arguments.py", "architecture BrandNewForCausalLM is not classified",
    ),
}  # fmt: skip


def test_what_moved_in_a_release_is_found_by_its_name(tmp_path):
    package = overlay(wheels.package(sglang_release.RELEASES[-1]), tmp_path / "sglang", CHANGES)
    for file, (old, new, *_) in CHANGES.items():
        text = (package / file).read_text()
        assert old in text
        (package / file).write_text(text.replace(old, new))
    found = list(inspection.findings(package))
    assert len(found) == len(CHANGES)
    for _, _, place, what in CHANGES.values():
        [finding] = [finding for finding in found if re.match(what, finding.what)]
        assert (finding.place, finding.breaks) == (place, place != "arguments.py")


@pytest.mark.parametrize("target, fits", [
    ("self, x, y=None", True),
    ("self, x, y=None, z=None", False),
    ("self, x", False),
    ("self, y, x=None", False),
    ("self, x, *, y=None", True),
    ("self, x, y", True),
    ("self, x, renamed=None", False),
])  # fmt: skip
def test_a_handler_fits_its_target_where_it_takes_every_call_of_it(tmp_path, target, fits):
    (tmp_path / "module.py").write_text(
        f"def handler(original, owner, x, y=None): ...\nclass C:\n    def target({target}): ...\n"
    )
    handler, method = (sglang_release.signature_in(tmp_path / "module.py", *n) for n in (["handler"], ["C", "target"]))
    assert sglang_release.stands_in(handler, method) is fits


def test_no_name_is_in_two_classes_or_in_no_release():
    known = set().union(*(sglang_release.server_arguments(wheels.package(r)) for r in sglang_release.RELEASES))
    assert set().union(*CLASSES.values()) == known
    assert sum(map(len, CLASSES.values())) == len(known)
    assert sum(len(names.split()) for names in arguments.NO_CONCERN.values()) == len(
        {name for names in arguments.NO_CONCERN.values() for name in names.split()}
    )
    variables = set().union(*(sglang_release.dsa_variables(wheels.package(r)) for r in sglang_release.RELEASES))
    assert set(arguments.REFUSED_VARIABLES) | arguments.OTHER_VARIABLES == variables


def _arguments(**given: object) -> SimpleNamespace:
    backends = dict.fromkeys(("prefill_attention_backend", "decode_attention_backend"))
    return SimpleNamespace(**{"attention_backend": BACKEND_NAME, "device": "cuda", **backends, **given})


@pytest.mark.parametrize("name", RULES)
def test_a_refused_value_is_refused_by_its_name_with_what_to_do(name, monkeypatch):
    devices = [d for d, rules in arguments.ON_DEVICE.items() if name in rules or name in arguments.REFUSED]
    monkeypatch.setattr(launch, "unclassified", lambda _: ())
    for device in devices:
        monkeypatch.setattr(launch, "_device_kind", lambda _, device=device: device)
        rule = {**arguments.REFUSED, **arguments.ON_DEVICE[device]}[name]
        for served in rule.served:
            launch.check_arguments(_arguments(**{name: served}), as_given=True)
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"^{flag} .*other-value.*: nsa_plugin .*\. ") as caught:
            launch.check_arguments(_arguments(**{name: "other-value"}), as_given=True)
        assert rule.why in str(caught.value)
        if rule.asked:  # SGLang's own choice
            launch.check_arguments(_arguments(**{name: "other-value"}))


@pytest.mark.parametrize("name", arguments.IN_PAIRS)
def test_what_was_not_tried_in_a_disaggregated_pair_is_refused_there(name, monkeypatch):
    monkeypatch.setattr(launch, "unclassified", lambda _: ())
    value = {"pp_size": 2, "lora_paths": ["a=b"]}.get(name, True)
    launch.check_arguments(_arguments(**{name: value}), as_given=True)
    for role in ("prefill", "decode"):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"^{flag} .* with --disaggregation-mode {role}: nsa_plugin .*Start "):
            launch.check_arguments(_arguments(disaggregation_mode=role, **{name: value}), as_given=True)


@pytest.mark.parametrize("name", arguments.REFUSED_VARIABLES)
def test_a_variable_that_would_be_ignored_is_refused(name, monkeypatch):
    rule = arguments.REFUSED_VARIABLES[name]
    for served in rule.served:
        monkeypatch.setenv(name, served.upper())
        launch.check_variables()
    value = "0" if "true" in rule.served else "1"
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name}={value}: nsa_plugin .*Unset it"):
        launch.check_variables()


def test_an_argument_that_is_not_classified_must_keep_its_default(monkeypatch):
    """What a newer release or an extension adds."""
    given = _arguments(brand_new=1)
    monkeypatch.setattr(launch, "_defaults", lambda _: {"brand_new": 1, "attention_backend": None})
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.99")
    launch.check_arguments(given, as_given=True)
    given.brand_new = 2
    with pytest.raises(
        ValueError, match=r"--brand-new is set \(2\): .* does not know this argument of SGLang 0\.5\.99"
    ):
        launch.check_arguments(given, as_given=True)


def test_the_device_is_known_before_sglang_has_found_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for device, kind in ((None, "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda")):
        assert launch._device_kind(_arguments(device=device)) == kind
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert launch._device_kind(_arguments(device=None)) == "cuda"


def test_an_untested_release_is_looked_at_first(monkeypatch, caplog):
    """Before anything else is checked, in the launch and in the factory."""
    new, gone = inspection.Finding("arguments.py", "argument a is new", False), "rope_cpu: sglang.f is not there"
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.99")
    monkeypatch.setattr(inspection, "findings", lambda package: [new])
    monkeypatch.delenv("NSA_PLUGIN_ALLOW_UNTESTED_SGLANG", raising=False)
    with pytest.raises(ValueError, match="set NSA_PLUGIN_ALLOW_UNTESTED_SGLANG=1 to try this one at your own risk"):
        launch.check_settings()
    monkeypatch.setenv("NSA_PLUGIN_ALLOW_UNTESTED_SGLANG", "1")
    with caplog.at_level("WARNING"):
        launch.check_settings()
    [line] = caplog.messages
    assert re.search(r"never tried with SGLang 0\.5\.99 .* 0 do not fit: none\. .* are 1: argument a is new", line)
    monkeypatch.setattr(inspection, "findings", lambda package: [new, inspection.Finding("ledger.py", gone, True)])
    with pytest.raises(ValueError, match=rf"SGLang 0\.5\.99 lacks .*{re.escape(gone)}\. Install a supported"):
        launch.check_settings()
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.16")
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.16 is not supported"):
        launch.check_settings()
