"""Launch of a Triton kernel, or only its compilation where the tensors are on `meta`.

So a call with `meta` tensors prepares a served call: it compiles what that call will launch, with the same
specialization of its arguments, and writes nothing. Within `triton.AsyncCompileMode` kernels compile side by side.
"""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Enqueue `kernel` on a grid. args: its run-time arguments, a tensor first. options: constants, launch options."""
    if args[0].is_meta:
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)
