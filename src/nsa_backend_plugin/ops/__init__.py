"""Pure tensor operations of DSA and MLA attention.

One folder per operation: `__init__.py` holds the public functions, `reference.py` the torch reference
(implementation name `torch`), every other file one implementation. Nothing here imports sglang.
"""
