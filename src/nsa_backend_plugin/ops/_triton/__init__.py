"""What the Triton kernels share: targets, early launch, fp8 conversion, the MLA kernels."""
