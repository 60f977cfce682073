"""Stand-in for torchvision: every module and attribute exists, and using one raises NotImplementedError.

SGLang and transformers import torchvision at start, also for text models, and its wheels do not import on a CPU build
of torch. Text serving never calls it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.0.0+stub"
__path__: list[str] = []


class _Missing(type):
    """Classes, so that they can be subclassed, compared, and used in isinstance and as dictionary keys."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _missing(f"{cls.__qualname__}.{name}")
        setattr(cls, name, value)  # the same object at every access
        return value

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"{cls.__qualname__}: this torchvision is a stand-in without any function")


def _missing(qualname: str) -> type:
    return _Missing(qualname.rsplit(".", 1)[-1], (), {"__module__": __name__, "__qualname__": qualname})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _missing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every `torchvision.<anything>`."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Finder())


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    value = _missing(f"{__name__}.{name}")
    globals()[name] = value
    return value
