"""Repeat a call that the witness saved, by several implementations, each beside the torch reference.

    nsa-plugin replay nsa_plugin_witness/sparse_mla.attend-aiter-17-1.pt --impl aiter triton

Exit code 0 when every implementation agrees with torch, 1 when one differs or cannot run the call.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what the witness saved, or `ops.witness.save` wrote")
    parser.add_argument("--impl", nargs="+", metavar="NAME", help="default: the one that was seen to differ")
    parser.add_argument("--device", default="", help="default: the GPU if there is one, else the CPU")


def run(options: argparse.Namespace) -> int:
    import torch

    from nsa_backend_plugin.engine import kernels
    from nsa_backend_plugin.ops import dispatch, witness
    from nsa_backend_plugin.ops.arch import device_arch
    from nsa_backend_plugin.ops.call import Declined

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kernels.register()
    try:
        name, seen, arguments = witness.load(options.file, device)
        operation = next(operation for operation in dispatch.operations() if operation.name == name)
        arguments |= {"arch": device_arch(device)}
        operation.call_type(**arguments)  # a TypeError says which arguments another version had
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        print(f"{options.file}: expected a call that the witness saved ({type(error).__name__}: {error})")
        return 1
    print(f"{name} on {device_arch(device)}, {seen} was seen to differ")

    def result_of(implementation: str) -> torch.Tensor:
        call = operation.call_type(**arguments | {"impl": implementation})
        return call.comparable(operation.run(call))

    expected, differing = result_of("torch"), 0
    for implementation in options.impl or [seen]:
        try:
            distances = witness.row_distance(result_of(implementation), expected).tolist()
        except (Declined, ValueError) as error:
            print(f"{implementation:>12}: {error}")
            differing += 1
            continue
        worst = max(range(len(distances)), key=distances.__getitem__)
        verdict = "differs" if distances[worst] > operation.call_type.bar else "agrees"
        differing += verdict == "differs"
        print(
            f"{implementation:>12}: {verdict}, row {worst} of {len(distances)} is farthest, by {distances[worst]:.2e}"
        )
    return int(differing > 0)
