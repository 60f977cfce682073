"""FlashInfer, shared by the adapters of `topk` and `dense_mla`: it compiles its kernels at their first call."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.call import Reason


def missing(module: str, *names: str) -> Reason:
    """Why FlashInfer cannot run: absent, without the names, or without what its kernels are compiled from."""
    reason = probe.missing(module, *names)
    if reason is not None or importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return reason
    if shutil.which("nvcc") is None:
        return "FlashInfer compiles its kernels with nvcc, which is not on PATH, and flashinfer_jit_cache is not there"
    package = importlib.util.find_spec("flashinfer")
    assert package is not None
    assert package.origin is not None
    headers = Path(package.origin).parent / "data" / "cutlass" / "include"
    return None if headers.is_dir() else f"FlashInfer compiles its kernels with {headers}, which is not there"
