"""What cannot be served is refused at launch, with the argument, its value and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from examples.make_random_model import INDEXER
from nsa_backend_plugin.engine import arguments, launch, release
from nsa_backend_plugin.serving import ServerError

from .conftest import HERE, run_python

pytestmark = pytest.mark.engine

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


class Case(NamedTuple):
    model: str
    arguments: tuple[str, ...]
    #: A pattern, None where it is served.
    error: str | None
    #: The release that it runs in, None for the installed one.
    sglang: str | None
    environment: dict[str, str]


def case(model: str, *arguments: str, error: str | None = None, sglang: str | None = None, **environment: str) -> Case:
    return Case(model, arguments, error, sglang, environment)


CASES = {
    "dsa is served": case("dsa"),
    "dsa with page size 64 is served": case("dsa", "--page-size=64"),
    "mla is served": case("mla"),
    "mla with page size 64 is served": case("mla", "--page-size=64"),
    "model without MLA": case("llama", error="LlamaForCausalLM does not use Multi-head Latent Attention.*Choose"),
    "page size of dsa": case("dsa", "--page-size=32", error=r"--page-size 32 with .*DSA.*serves page size 64"),
    "page size of mla": case("mla", "--page-size=8", error=r"--page-size 8 with .*serves page size 1, 16, 32, 64"),
    "index head dim": case("dsa-index64", error="index_head_dim 64: nsa_plugin serves 128"),
    "pooled index keys": case("dsa-kpool", error="index_kpool 4: nsa_plugin does not serve"),
    "latent width": case("mla-rank256", error="kv_lora_rank 256 .*serves 512 and 64"),
    "newer sglang": case("dsa", error=rf"SGLang 0\.5\.99 is not supported.*{release.RANGE}", sglang="0.5.99"),
    "newer sglang at one's own risk": case("dsa", sglang="0.5.99", NSA_PLUGIN_ALLOW_UNTESTED_SGLANG="1"),
    "older sglang": case("dsa", error=r"SGLang 0\.5\.16\.post2 is not supported", sglang="0.5.16.post2"),
    "implementation name": case(
        "dsa", error="NSA_PLUGIN_TOPK_IMPL='nonsense': expected one of .*torch", NSA_PLUGIN_TOPK_IMPL="nonsense"
    ),
    "environment value": case(
        "dsa",
        error="NSA_PLUGIN_INDEX_LAYOUT='diagonal': expected one of auto, row_major, preshuffled",
        NSA_PLUGIN_INDEX_LAYOUT="diagonal",
    ),
    "environment name": case("dsa", error="NSA_PLUGIN_EXACTLY.*valid names are .*EXACT", NSA_PLUGIN_EXACTLY="1"),
    "hicache": case("dsa", "--enable-hierarchical-cache", error=r"--enable-hierarchical-cache.*\(HiCache\) yet"),
    "prefill of pd is served": case("mla", "--disaggregation-mode=prefill"),
    "decode of pd is served": case("dsa", "--disaggregation-mode=decode"),
    "transfer of pd": case(
        "dsa",
        "--disaggregation-mode=decode",
        "--disaggregation-transfer-backend=nixl",
        error=r"--disaggregation-transfer-backend is set \('nixl'\).*than Mooncake's",
    ),
    "speculative": case("dsa", "--speculative-algorithm=NGRAM", error="--speculative-algorithm.*speculative"),
    "tree of drafts": case(
        "dsa",
        "--speculative-algorithm=EAGLE",
        "--speculative-eagle-topk=4",
        error=r"--speculative-eagle-topk is set \(4\).*tree",
    ),
    "drafts on a cpu": case(
        "dsa", "--speculative-algorithm=NEXTN", error="--speculative-algorithm NEXTN on cpu: .*NVIDIA GPUs only"
    ),
    "flexkv": case("dsa", "--enable-flexkv", error="--enable-flexkv is set .*FlexKV"),
    "radix cache": case("mla", "--radix-cache-backend=flexkv", error="--radix-cache-backend is set .'flexkv'.*radix"),
    "context parallel": case("dsa", "--tp=2", "--attn-cp-size=2", error="--attn-cp-size 2 on cpu: .*NVIDIA GPUs"),
    "zigzag": case("dsa", "--cp-strategy=zigzag", error=r"--cp-strategy is set \('zigzag'\).*Use .*interleave"),
    "pipeline is served": case("dsa", "--pp-size=2"),
    "pipeline of pd": case(
        "dsa",
        "--disaggregation-mode=decode",
        "--pp-size=2",
        error=r"--pp-size 2 with --disaggregation-mode decode: nsa_plugin does not support pipeline",
    ),
    "pipeline of shared top-k": case(
        "dsa-shares",
        "--pp-size=2",
        error=r"--pp-size 2 with DeepseekV32ForCausalLM, whose layers share their top-k: .*never run.*Start without",
    ),
    "dsa kernel": case(
        "dsa",
        "--dsa-decode-backend=fa3",
        error="--dsa-decode-backend is set .'fa3'.*kernels of its own.*NSA_PLUGIN_SPARSE_MLA_IMPL",
    ),
    "top-k kernel": case(
        "dsa", "--dsa-topk-backend=flashinfer", error="--dsa-topk-backend is set .'flashinfer'.*NSA_PLUGIN_TOPK_IMPL"
    ),
    "logits kernel": case(
        "dsa",
        "--dsa-paged-mqa-logits-backend=deepgemm",
        error="--dsa-paged-mqa-logits-backend is set .*NSA_PLUGIN_MQA_LOGITS_IMPL",
    ),
    "compiled": case("dsa", "--enable-torch-compile", error=r"--enable-torch-compile is set .*torch\.compile yet"),
    "lora on a cpu": case("mla", "--enable-lora", error="--enable-lora True on cpu: .*pinned memory. Start without"),
    "top-k broadcast": case(
        "dsa",
        error="SGLANG_DSA_TOPK_BROADCAST=1: nsa_plugin does not broadcast .*Unset it",
        SGLANG_DSA_TOPK_BROADCAST="1",
    ),
    "positions beside an indexer": case("dsa-scaled", error="llama_4_scaling .*scaled by position beside"),
    "an indexer in DeepSeek-V3": case("mla-indexed", error="index_topk 32: nsa_plugin was never tried with an ind"),
    "a first layer that shares": case("dsa-shared", error="begins with a layer that takes the top-k of one before"),
    "architecture": case(
        "mla-minicpm3",
        error="MiniCPM3ForCausalLM has narrower latents, and was never run with nsa_plugin: nsa_plugin does not serve",
    ),
    "mla with fp8 rows is served": case("mla", "--kv-cache-dtype=fp8_e4m3"),
    "rows of mla": case(
        "mla",
        "--kv-cache-dtype=fp8_e5m2",
        error="--kv-cache-dtype fp8_e5m2 with DeepseekV3ForCausalLM: nsa_plugin serves auto, .*fp8_e4m3 for models",
    ),
    "sinks": case("mla-sink", error="has learnable_sink True: nsa_plugin does not serve a learnable attention sink"),
    "two backends": case(
        "mla",
        "--decode-attention-backend=torch_native",
        error="nsa_plugin, torch_native: nsa_plugin must serve prefill and decode alike",
    ),
}
#: Models of the cases: what is changed in the configuration of the one that the name begins with.
VARIANTS: dict[str, dict[str, object]] = {
    "dsa-index64": {"index_head_dim": 64},
    "dsa-kpool": {"index_kpool": 4},
    "dsa-scaled": {"llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1}},
    "dsa-shares": {"index_topk_pattern": "FSF"},
    "dsa-shared": {"index_topk_pattern": "SFF"},
    "mla-sink": {"learnable_sink": True},
    "mla-indexed": INDEXER,
    "mla-rank256": {"kv_lora_rank": 256},
    "mla-minicpm3": {"architectures": ["MiniCPM3ForCausalLM"]},
}
#: With another backend, or none, on the command line nothing of ours may run.
OTHERS = {"torch_native": ["--attention-backend=torch_native"], "triton": ["--attention-backend=triton"]}


def _copy_with(model: Path, folder: Path, **changes: object) -> Path:
    """A model folder without weights: resolving arguments reads the configuration only."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def resolved(models, tmp_path_factory) -> dict[str, dict]:
    """Outcome of every case, from one process."""
    folder = tmp_path_factory.mktemp("resolve")
    paths = dict(models)
    for name, changes in VARIANTS.items():
        paths[name] = _copy_with(models[name.split("-")[0]], folder / name, **changes)
    paths["llama"] = folder / "llama"
    paths["llama"].mkdir()
    (paths["llama"] / "config.json").write_text(json.dumps(LLAMA))
    cpu = ["--device=cpu", "--sampling-backend=pytorch", "--disable-cuda-graph"]
    cases = {
        name: {
            "argv": [f"--model-path={paths[one.model]}", "--attention-backend=nsa_plugin", *cpu, *one.arguments],
            "env": one.environment,
            "sglang": one.sglang,
        }
        for name, one in CASES.items()
    }
    cases |= {name: {"argv": [f"--model-path={paths['llama']}", *cpu, *args]} for name, args in OTHERS.items()}
    path = folder / "cases.json"
    path.write_text(json.dumps(list(cases.values())))
    output = run_python(HERE / "resolve_cases.py", path, env={"NSA_PLUGIN_CPU": "1"})
    return dict(zip(cases, json.loads(output.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_resolution(resolved, name):
    error, pattern = resolved[name]["error"], CASES[name].error
    assert resolved[name]["hooks"] == ["resolution"]
    if pattern is None:
        assert error is None
    else:
        assert error is not None, "resolved without an error"
        assert re.match(f"ValueError: .*{pattern}", error, re.DOTALL), error


@pytest.mark.parametrize("name", OTHERS)
def test_no_hook_acts_for_another_backend(resolved, name):
    """`resolution` wraps SGLang's function, sees that another backend is selected, and must do nothing."""
    assert resolved[name]["error"] is None
    assert resolved[name]["hooks"] == []
    assert resolved[name]["taught"] is False


LAUNCHES = {
    # Raised by the platform's entry point first, where SGLang swallows it.
    "bad value": ({"NSA_PLUGIN_CPU": "banana"}, "ValueError: NSA_PLUGIN_CPU='banana': expected one of auto, 0, 1"),
    # Known only when the device is, in the scheduler process.
    "forced": (
        {"NSA_PLUGIN_SPARSE_MLA_IMPL": "triton"},
        "ValueError: NSA_PLUGIN_SPARSE_MLA_IMPL=triton: cannot run on",
    ),
    "broken import": ({}, "RuntimeError: nsa_plugin could not be loaded: ImportError: libbroken.so: cannot open"),
}
#: Makes the import of one of our modules fail as a broken kernel library does.
SITECUSTOMIZE = """
import sys
class Broken:
    def find_spec(self, name, path, target=None):
        if name == "nsa_backend_plugin.engine.release":
            raise ImportError("libbroken.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_dies_of_the_real_reason(models, start_server, tmp_path, name):
    env, message = LAUNCHES[name]
    if name == "broken import":
        (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
        env = {**env, "PYTHONPATH": str(tmp_path)}
    server = start_server(models["dsa"], (), env)
    with pytest.raises(ServerError, match=r"exited with code -?[1-9]"):
        server.start()
    log = server.log_path.read_text()
    assert message in log
    assert name == "forced" or "Load weight" not in log, "refused only after the weights were loaded"


def test_the_arguments_of_the_installed_sglang_are_those_in_its_source():
    """`release.server_arguments` reads the wheels of releases that are not installed: it must find what is there."""
    from sglang.srt.server_args import ServerArgs

    package = release.installed_package()
    assert set(launch._defaults(ServerArgs)) == set(release.server_arguments(package))


def test_the_default_of_every_refused_argument_is_served():
    from sglang.srt.server_args import ServerArgs

    for name, default in launch._defaults(ServerArgs).items():
        if name in arguments.REFUSED:
            assert default in arguments.REFUSED[name].served, name
