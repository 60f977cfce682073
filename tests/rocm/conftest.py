"""Kernels run in Triton's interpreter on a CPU: make it convert floats as GPUs do."""

import nsa_backend_plugin.ops.triton_interpreter  # noqa: F401
