"""The SGLang releases that are supported, and what the installed one has, from its source: nothing is imported.

Importing a target takes half a minute and fails for modules that need a GPU library, also where the target is there.
Differences between releases are found by looking at what is there, not at version numbers.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nsa_backend_plugin import settings

#: What the wheels' checks run on (tests/test_arguments.py); later packagings of one of them are supported too.
RELEASES = ("0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
RANGE = f"{RELEASES[0]} to {RELEASES[-1]}"
#: Assigned, to the patch's name, in the module that a patch of patches/ changes.
PATCH_MARKER = "_NSA_PLUGIN_PATCH"


def version() -> str:
    """Version of the installed SGLang."""
    return importlib.metadata.version("sglang")


def supported(release: str) -> bool:
    return numbers(RELEASES[0]) <= numbers(release) <= numbers(RELEASES[-1])


def newer(release: str) -> bool:
    """Whether a release is newer than every supported one."""
    return numbers(release) > numbers(RELEASES[-1])


def numbers(release: str) -> tuple[int, ...]:
    """Its three numbers, to compare; none of what is not a release, which is older than every one."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", release)
    return tuple(int(n) for n in match.groups()) if match else ()


def require_supported() -> None:
    """Raise ValueError when the installed SGLang is outside the range the hooks were written for.

    NSA_PLUGIN_ALLOW_UNTESTED_SGLANG=1 lets a newer one pass; `launch.check_untested` then looks at what it has.
    """
    if supported(version()) or (newer(version()) and settings.enabled("NSA_PLUGIN_ALLOW_UNTESTED_SGLANG")):
        return
    own_risk = ", set NSA_PLUGIN_ALLOW_UNTESTED_SGLANG=1 to try this one at your own risk" if newer(version()) else ""
    raise ValueError(
        f"SGLang {version()} is not supported by nsa_plugin: install sglang {RANGE}{own_risk}, or choose "
        "another --attention-backend"
    )


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of resolved arguments: a method, in newer releases a function."""
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def platform_declares_triton(package: Path | None = None) -> bool:
    """Whether SGLang asks the platform if Triton can run (`capabilities.supports_triton`); older ones look at names."""
    return exists("sglang.srt.platforms.interface.SRTPlatform.capabilities", package)


def hicache_draft_fault(package: Path | None = None) -> str | None:
    """How a release's hierarchical cache spoils drafts; None where it does not, from 0.5.23 on.

    0.5.18 began to keep a next-token layer's rows and index keys behind the model's own (pull request 30393), 0.5.19 to
    wait for the forward in flight before it loads pages (36738), 0.5.23 before it stores them.
    """
    if not mentions("sglang.srt.mem_cache.cache_init_params", "mtp_draft_device_pools", package):
        return (
            "does not keep a draft layer's index keys there, and drafts guess wrong once a prefix has come back "
            "(sglang issue 32176)"
        )
    if not mentions("sglang.srt.managers.cache_controller", "write_fence_stream", package):
        return "stores or loads pages there while the verification in flight may still write to them"
    return None


def installed_package(name: str = "sglang") -> Path | None:
    """Folder of an installed package."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def exists(target: str, package: Path | None = None) -> bool:
    """Whether `sglang.module.name` or `sglang.module.Class.attribute` is defined, assigned or imported there.

    package: a folder `sglang` to look into; None takes the installed one.
    """
    file, rest = _locate(target, package)
    return file is not None and (not rest or _find(file, rest) is not None)


def source(target: str, package: Path | None = None) -> str:
    """The code of the target, without comments; empty where it is not there."""
    file, rest = _locate(target, package)
    found = _find(file, rest) if file is not None else None
    return ast.unparse(found) if found is not None else ""


def signature(target: str, package: Path | None = None) -> inspect.Signature | None:
    """The parameters of the function `sglang.module.name` or `sglang.module.Class.method`; None of anything else."""
    file, rest = _locate(target, package)
    return signature_in(file, *rest) if file is not None else None


def signature_in(file: Path, *names: str) -> inspect.Signature | None:
    """The parameters of a function of a file, by its name or its class's and its own; every default is None."""
    found = _find(file, names)
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    bare = copy.deepcopy(found.args)
    for argument in (node for node in ast.walk(bare) if isinstance(node, ast.arg)):
        argument.annotation = None
    bare.defaults = [ast.Constant(None) for _ in bare.defaults]
    bare.kw_defaults = [default and ast.Constant(None) for default in bare.kw_defaults]
    return inspect.signature(eval(f"lambda {ast.unparse(bare)}: None"))


def stands_in(handler: inspect.Signature, target: inspect.Signature) -> bool:
    """Whether the handler, which gets the target before the arguments, takes every call of the target.

    Callers may give an argument by its place or by its name, all but self, and leave out what has a default.
    """
    wanted = list(target.parameters.values())
    places = [p.name for p in wanted if p.kind is not p.KEYWORD_ONLY]
    names = {p.name: p.name for p in wanted if p.kind is p.KEYWORD_ONLY}
    bound_self = ["self"] if places[:1] == ["self"] else []
    all_names = {p.name: p.name for p in wanted if p.name not in bound_self}
    least = {p.name: p.name for p in wanted if p.name in all_names and p.default is p.empty}
    try:
        by_place = handler.bind("original", *places, **names).arguments
        handler.bind("original", *bound_self, **all_names)
        handler.bind("original", *bound_self, **least)
    except TypeError:
        return False
    taken = [p.name for p in handler.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return all(by_place.get(name) in (name, "self") for name in taken)


def attributes(target: str, package: Path | None = None) -> set[str]:
    """Attributes that the class `sglang.module.Class` has or sets on itself; none where it is not there."""
    file, rest = _locate(target, package)
    body = _body(file) if file is not None else ()
    names: set[str] = set()
    for found in (s for s in _statements(body) if isinstance(s, ast.ClassDef) and [s.name] == rest):
        names |= {name for s in _statements(found.body) for name in _names(s)}
        names |= {
            node.attr
            for node in ast.walk(found)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        }
    return names


def patched(target: str, patch: str) -> bool:
    """Whether the patch is applied to the module of the target."""
    return mentions(target, f'\n{PATCH_MARKER} = "{patch}"\n')


def mentions(target: str, text: str, package: Path | None = None) -> bool:
    """Whether the code of the target's module, without its comments, has the text."""
    file, _ = _locate(target, package)
    return file is not None and text in "".join(f"{line.partition('#')[0]}\n" for line in _text(file).splitlines())


@functools.cache
def server_arguments(package: Path) -> dict[str, Any]:
    """The arguments of SGLang's servers, fields of ServerArgs or, in newer releases, of its parts: name -> default.

    A default that is not written as a plain value is `...`.
    """
    srt = package / "srt"
    classes = [c for c in _body(srt / "server_args.py") if isinstance(c, ast.ClassDef) and c.name == "ServerArgs"]
    for file in (srt / "arg_groups" / "fields").glob("*.py"):
        classes += [c for c in _body(file) if isinstance(c, ast.ClassDef)]
    fields = [s for c in classes for s in c.body if isinstance(s, ast.AnnAssign)]
    return {f.target.id: _plain(f.value) for f in fields if isinstance(f.target, ast.Name)}


@functools.cache
def dsa_variables(package: Path) -> set[str]:
    """Environment variables with DSA or NSA in their names, wherever SGLang reads or declares them."""
    names: set[str] = set()
    for part in ("srt", "kernels", "jit_kernel"):
        for file in (package / part).rglob("*.py"):
            names.update(re.findall(r"SGLANG_[A-Z0-9_]*[A-Z0-9]\b", file.read_text("utf-8")))
    return {name for name in names if re.search("_[DN]SA_", name)}


def mla_architectures(package: Path) -> set[str]:
    """Architectures that SGLang's ModelConfig calls MLA: the names in the conditions of the branches that say so."""
    module = ast.Module(list(_body(package / "srt" / "configs" / "model_config.py")), [])
    branches = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.If) and any("= AttentionArch.MLA" in ast.unparse(s) for s in node.body)
    ]
    words = [n.value for b in branches for n in ast.walk(b.test) if isinstance(n, ast.Constant)]
    return {w for w in words if isinstance(w, str) and re.search("For[A-Z]", w)}


def _locate(target: str, package: Path | None = None) -> tuple[Path | None, list[str]]:
    """(file of the target's module or None, names inside the module)."""
    name, *rest = target.split(".")
    folder = package or installed_package(name)
    if folder is None:
        return None, rest
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    if rest and (file := folder / f"{rest[0]}.py").exists():
        return file, rest[1:]
    file = folder / "__init__.py"
    return (file if file.exists() else None), rest


@functools.cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def _body(file: Path) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(_text(file)).body)


def _plain(value: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else ...
    except ValueError:
        return ...


def _find(file: Path, names: Iterable[str]) -> ast.stmt | None:
    """The statement that binds the last name, in the class that binds the one before it, and so on."""
    body: Iterable[ast.stmt] = _body(file)
    found = None
    for name in names:
        found = next((s for s in _statements(body) if name in _names(s)), None)
        if found is None:
            return None
        body = found.body if isinstance(found, ast.ClassDef) else ()
    return found


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those of its conditional blocks."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, block, ()))


def _names(statement: ast.stmt) -> set[str]:
    """Names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {t.id for t in targets if isinstance(t, ast.Name)}
