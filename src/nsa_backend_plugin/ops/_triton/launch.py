"""Launch of a Triton kernel, or only its compilation where the tensors are on `meta`.

So a call with `meta` tensors prepares a served call: it compiles what that call will launch, with the same
specialization of its arguments, and writes nothing. Within `triton.AsyncCompileMode` kernels compile side by side.
"""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, resident: int = 1, **options: Any) -> None:
    """Enqueue `kernel` on a grid. args: its run-time arguments, a tensor first. options: constants, launch options.

    resident: programs that the size of the grid counts on a core to hold at once; `tools.compile_matrix` looks whether
    registers and shared memory leave room for them.
    """
    if args[0].is_meta:
        warm_up(kernel, grid, args, options, resident)
    else:
        kernel[grid](*args, **options)


def warm_up(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], resident: int) -> None:
    """Compile what a launch would run."""
    kernel.warmup(*args, grid=grid, **options)
