"""The backend factory: final checks with the loaded model at hand, the report of what runs, the backend's choice."""

from __future__ import annotations

import logging
from typing import Any

import torch

from nsa_backend_plugin import __version__, settings
from nsa_backend_plugin.engine import contract, hooks, index_cache, latent_rows, launch, release, shapes
from nsa_backend_plugin.engine.gpu import rocm
from nsa_backend_plugin.ops import dispatch
from nsa_backend_plugin.ops.arch import device_arch, is_cuda
from nsa_backend_plugin.runtime import prepare, served

logger = logging.getLogger(__name__)


def create_backend(runner: contract.ModelRunner) -> Any:
    """Backend of a ModelRunner. Raises ValueError, with what to do, for what cannot be served."""
    hooks.fired("factory")
    launch.check_settings()
    launch.check_arguments(runner.server_args)
    launch.check_model(runner.model_config, runner.token_to_kv_pool.page_size)
    device = torch.device(runner.device)
    launch.check_platform(device.type)
    launch.check_exact(runner.dtype, device, runner.server_args.disaggregation_mode)
    dispatch.require_forced(device)
    hooks.install("factory")
    backend = _cpu_backend(runner) if device.type == "cpu" else _gpu_backend(runner)
    index_cache.name_layout(runner)
    _report_and_prepare(runner, device, type(backend).__name__)
    return backend


def _cpu_backend(runner: Any) -> Any:
    from nsa_backend_plugin.engine.cpu import bridges
    from nsa_backend_plugin.engine.cpu.backend import NsaPluginCpuBackend

    if not launch.has_indexer(runner.model_config):
        latent_rows.check_plain(runner.kv_cache_dtype, runner.dtype, "cpu")
    elif not runner.kv_cache_dtype.is_floating_point or runner.kv_cache_dtype.itemsize < 2:
        raise ValueError(
            f"--kv-cache-dtype {runner.kv_cache_dtype}: on cpu nsa_plugin keeps the latent cache in the model's dtype. "
            "Use --kv-cache-dtype auto"
        )
    if runner.server_args.disaggregation_mode == "prefill":
        bridges.send_without_cuda()
    return NsaPluginCpuBackend(runner)


def _gpu_backend(runner: Any) -> Any:
    hooks.install("gpu")
    if not launch.has_indexer(runner.model_config):
        if rocm.on_rocm():
            raise ValueError(
                "nsa_plugin serves MLA models without an indexer on NVIDIA and CPU only, not on ROCm: choose another "
                "--attention-backend, such as aiter or triton"
            )
        from nsa_backend_plugin.engine.gpu.mla_backend import NsaPluginMLABackend

        return NsaPluginMLABackend(runner)
    from nsa_backend_plugin.engine import merging
    from nsa_backend_plugin.engine.gpu.dsa_backend import NsaPluginDSABackend

    hooks.install("gpu_dsa")
    merging.settle(runner.model, torch.device(runner.device).type)
    return NsaPluginDSABackend(runner)


def _report_and_prepare(runner: Any, device: torch.device, backend: str) -> None:
    """Say what will run, and compile it before graphs are captured."""
    mode = ", exact mode: float32, unquantized caches" if settings.enabled("NSA_PLUGIN_EXACT") else ""
    logger.info("nsa_plugin %s on SGLang %s: %s on %s%s", __version__, release.version(), backend, device, mode)
    for name in hooks.standing_down():
        logger.info("nsa_plugin hook stands down, its patch is applied: %s", name)
    steps = shapes.steps(runner.model_config.context_len)
    model, arch = shapes.model(runner), device_arch(device)
    decode = [step for step in steps if not step.prefill]
    shown = dict.fromkeys((decode[0], decode[-1], steps[-1]))
    for line in served.report(model, shown, arch):
        logger.info("nsa_plugin op %s", line)
    if is_cuda(arch):
        prepare.compile_kernels(made for step in steps for made in served.calls(model, step, arch))
