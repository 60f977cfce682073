"""One probe for every vendor library: is it there, does it load, has it the names that an adapter calls?"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect

from nsa_backend_plugin.ops.call import Reason


@functools.cache
def missing(module: str, *names: str) -> Reason:
    """Why a module cannot be used: not installed, does not load, or lacks one of the names. Never raises."""
    package = module.partition(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        loaded = importlib.import_module(module)
    except Exception as error:  # extensions fail with ImportError, OSError, RuntimeError, AssertionError ...
        return f"{module} cannot be imported: {error}"
    absent = [name for name in names if not hasattr(loaded, name)]
    return f"{module} has no {', '.join(absent)}" if absent else None


@functools.cache
def missing_parameters(module: str, function: str, *parameters: str) -> Reason:
    """Which of the parameters a function, which `missing` found, does not take yet."""
    known = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return None  # a wrapper, which does not say what it takes
    absent = [name for name in parameters if name not in known]
    return f"{module}.{function} does not take {', '.join(absent)}" if absent else None
