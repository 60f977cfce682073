"""requirements/install.py as a module: it is a script beside its data, in no package."""

import importlib.util
import pathlib
import sys

REQUIREMENTS = pathlib.Path(__file__).resolve().parents[2] / "requirements"

_spec = importlib.util.spec_from_file_location("nsa_plugin_installer", REQUIREMENTS / "install.py")
assert _spec is not None
assert _spec.loader is not None
install = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = install  # dataclasses look their module up
_spec.loader.exec_module(install)
