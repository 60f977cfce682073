"""What the adapters to vendors' kernels share: whether a library is there, limits and padding of MLA kernels, AITER."""
