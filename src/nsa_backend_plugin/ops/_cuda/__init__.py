"""What the CUDA C++ kernels share: run-time compilation and launch."""
