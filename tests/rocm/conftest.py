"""Kernels run in Triton's interpreter on a CPU: make it convert floats as GPUs do."""

import tools.triton_interpreter  # noqa: F401
