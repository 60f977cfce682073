"""Every argument, variable and architecture of every supported release has its class, and the checks obey it.

The names come from the wheels (`tests/wheels.py`); what real servers say is in tests/engine/test_refusals.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import arguments, contract, launch, ledger
from nsa_backend_plugin.engine import release as sglang_release
from tests import wheels

RULES = {**arguments.REFUSED, **{n: r for rules in arguments.ON_DEVICE.values() for n, r in rules.items()}}
CLASSES = {
    "refused": set(arguments.REFUSED),
    "served": set(arguments.SERVED),
    **{subject: set(names.split()) for subject, names in arguments.NO_CONCERN.items()},
}


@pytest.fixture(scope="module", params=wheels.RELEASES)
def package(request):
    return wheels.package(request.param)


def test_the_wheels_are_of_every_supported_release():
    assert all(map(sglang_release.supported, wheels.RELEASES))
    oldest, newest = (".".join(map(str, v)) for v in (sglang_release.OLDEST, sglang_release.NEWEST))
    assert (wheels.RELEASES[0], wheels.RELEASES[-1]) == (oldest, newest)


def test_every_argument_of_a_release_is_classified(package):
    names = sglang_release.server_arguments(package)
    assert len(names) > 400
    assert {name for name in names if not arguments.classified(name)} == set()


def test_every_variable_of_a_release_is_classified(package):
    names = sglang_release.dsa_variables(package)
    assert {"SGLANG_DSA_FUSE_TOPK", "SGLANG_DSA_TOPK_BROADCAST"} <= names
    assert names - set(arguments.REFUSED_VARIABLES) - arguments.OTHER_VARIABLES == set()


def test_every_mla_architecture_of_a_release_is_classified(package):
    names = sglang_release.mla_architectures(package)
    assert {"DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM", "KimiLinearForCausalLM"} <= names
    assert names - set(arguments.ARCHITECTURES) == set()


def test_every_target_of_the_ledger_is_in_a_release(package):
    """Rows that a release does not need are those whose own condition says so by what it finds in the source."""
    optional = {"fused_decode_rocm", "mla_pool", "support_triton", "transfer_indices"}
    for row in ledger.LEDGER:
        found = [t for t in (row.target, row.older_target) if t and sglang_release.exists(t, package)]
        assert found or row.name in optional, f"{row.name}: {row.target} is not in {package.parent.name}"


def test_every_attribute_that_we_read_is_in_a_release(package, tmp_path):
    assert list(contract.missing(package)) == []
    assert len(list(contract.missing(tmp_path))) == sum(len(p.__annotations__) for p in contract.CLASSES)


def test_no_name_is_in_two_classes_or_in_no_release():
    known = set().union(*(sglang_release.server_arguments(wheels.package(r)) for r in wheels.RELEASES))
    assert set().union(*CLASSES.values()) == known
    assert sum(map(len, CLASSES.values())) == len(known)
    assert sum(len(names.split()) for names in arguments.NO_CONCERN.values()) == len(
        {name for names in arguments.NO_CONCERN.values() for name in names.split()}
    )
    variables = set().union(*(sglang_release.dsa_variables(wheels.package(r)) for r in wheels.RELEASES))
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
    value = {"speculative_algorithm": "NEXTN", "lora_paths": ["a=b"]}.get(name, True)
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
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.24")
    launch.check_arguments(given, as_given=True)
    given.brand_new = 2
    with pytest.raises(
        ValueError, match=r"--brand-new is set \(2\): .* does not know this argument of SGLang 0\.5\.24"
    ):
        launch.check_arguments(given, as_given=True)


def test_the_device_is_known_before_sglang_has_found_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for device, kind in ((None, "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda")):
        assert launch._device_kind(_arguments(device=device)) == kind
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert launch._device_kind(_arguments(device=None)) == "cuda"


def test_an_untested_release_is_looked_at_first(monkeypatch, caplog):
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.24")
    monkeypatch.setattr(launch, "_defaults", lambda _: {"brand_new": 1})
    with caplog.at_level("WARNING"):
        launch.check_untested(_arguments(brand_new=1))
    assert "never tried with SGLang 0.5.24" in caplog.text
    assert "brand_new" in caplog.text
    monkeypatch.setattr(sglang_release, "exists", lambda target, package=None: "rope" not in target)
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.24 lacks .*rope_cpu \(sglang\.srt\.layers\.rotary_embedding"):
        launch.check_untested(_arguments(brand_new=1))
