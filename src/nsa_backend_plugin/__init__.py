"""Attention backend for DeepSeek Sparse Attention (DSA) and MLA models in SGLang.

Importing this package imports neither torch, nor sglang, nor any kernel library: SGLang imports the
entry points in every process it starts.
"""

__version__ = "0.1.0"
BACKEND_NAME = "nsa_plugin"
