"""The import hook: makes ``import natten`` find a stand-in where NATTEN itself is absent, and never in its place.

Standard library alone: it may be loaded when the interpreter starts, before PyTorch and without importing nbhd.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

VARIABLE = "NBHD_NATTEN"
NEWEST = "0.21.7"
PACKAGE = "nbhd.compat.natten"
DINAT = "transformers.models.dinat.modeling_dinat"

#: The newest release of each minor version, and the package that stands for it.
ERAS = {14: ("0.14.6", "v0_14"), 15: ("0.15.1", "v0_15"), 17: ("0.17.5", "v0_17"), 20: ("0.20.1", "v0_20"),
        21: (NEWEST, "v0_21")}  # fmt: skip
#: Releases up to which an earlier package stands.
EARLIER = {14: (4, "v0_14_4"), 21: (1, "v0_21_1")}

_OLD = {"functional": "functional", "natten1d": "modules", "natten2d": "modules"}
_NEW = {
    "functional": "functional",
    "modules": "v0_20.modules",
    "context": "v0_20.context",
    "types": "core.kinds",
    "backends": "core.choosing",
    "backends.configs": "core.tile_configs",
    "backends.reference": "core.oracle",
    "utils": "core.utils",
    "utils.checks": "core.checks",
    "utils.log": "core.logs",
    "utils.varlen": "core.varlen",
    "attn_merge": "v0_20.attn_merge",
    "version": "core.version",
    "_environment": "core.environment",
}
#: Submodules of ``natten``: a module of the era's package, or with a dot one of nbhd.compat.natten.
SUBMODULES = {
    "v0_14_4": {**_OLD, "flops": "core.flops"},
    "v0_14": {**_OLD, "flops": "core.flops"},
    "v0_15": {**_OLD, "natten3d": "modules", "flops": "core.flops"},
    "v0_17": {
        **_OLD,
        "natten3d": "modules",
        "na1d": "modules",
        "na2d": "modules",
        "na3d": "modules",
        "context": "context",
        "experimental": "functional",
        "flops": "flops",
        "types": "core.kinds",
        "utils": "utils",
        "utils.checks": "utils",
        "utils.log": "core.logs",
    },
    "v0_20": _NEW,
    "v0_21": {**_NEW, "attn_merge": "attn_merge", "utils.checks": "checks"},
    "v0_21_1": _NEW,
}


def resolve(version: str | None) -> tuple[str, str]:
    """The full version a request means, and the package that stands for it.

    Raises:
        ValueError: NATTEN had no such version.
    """
    if version is None:
        return NEWEST, ERAS[21][1]
    match = re.fullmatch(r"0\.(\d+)(?:\.(\d+))?(?:\.?(?:post|dev|rc|a|b)\d+)?", str(version).strip())
    minor = int(match[1]) if match else -1
    if match is None or minor not in ERAS:
        known = ", ".join(f"0.{n}" for n in ERAS)
        raise ValueError(f"there is no stand-in for NATTEN {version!r}. Versions: {known}, with or without a patch.")
    newest, package = ERAS[minor]
    if match[2] is None:
        return newest, package
    last, earlier = EARLIER.get(minor, (-1, ""))
    return str(version).strip(), earlier if int(match[2]) <= last else package


class Finder(importlib.abc.MetaPathFinder):
    """First on ``sys.meta_path``, and gives way to a real NATTEN wherever another finder has one."""

    def __init__(self, version: str, package: str) -> None:
        self.version = version
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Ours for ``natten`` and below; for transformers' DiNAT the one found by others, watched."""
        if fullname == DINAT:
            return self._watched(fullname, path, target)
        if fullname != "natten" and not fullname.startswith("natten."):
            return None
        if fullname == "natten":
            if real_natten(path, target) is not None:
                return None
            return self._spec(fullname, f"{PACKAGE}.{self.package}")
        parent = sys.modules.get("natten")
        if parent is None or not is_ours(parent):
            return None
        name = fullname.removeprefix("natten.")
        where = SUBMODULES[self.package].get(name)
        if where is None:
            return None
        return self._spec(fullname, f"{PACKAGE}.{where}" if "." in where else f"{PACKAGE}.{self.package}.{where}")

    def _spec(self, fullname: str, source: str) -> importlib.machinery.ModuleSpec:
        loader = Loader(source, self.version, SUBMODULES[self.package])
        children = fullname == "natten" or any(
            name.startswith(fullname.removeprefix("natten.") + ".") for name in SUBMODULES[self.package]
        )
        return importlib.machinery.ModuleSpec(fullname, loader, origin=source, is_package=children)

    def _watched(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of transformers' DiNAT, whose loader lets us look at the module once it has run."""
        spec = _found_by_others(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            natten = sys.modules.get("natten")
            if natten is not None and is_ours(natten):
                importlib.import_module(f"{PACKAGE}.dinat").settle(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """The metadata of a distribution named natten, for ``importlib.metadata``."""
        name = getattr(context, "name", None)
        if name is not None and re.sub(r"[-_.]+", "-", name).lower() != "natten":
            return
        # A search of some folder, such as an installer's, is no question about this process.
        searched = vars(context).get("path") if context is not None else None
        if searched is not None and list(searched) != sys.path:
            return
        if real_natten() is None:
            yield _distribution(self.version)


class Loader(importlib.abc.Loader):
    """Fills a module named ``natten...`` with the names of the one that stands for it."""

    def __init__(self, source: str, version: str, submodules: dict[str, str]) -> None:
        self.source = source
        self.version = version
        self.submodules = submodules

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """An ordinary new module: the one it is filled from keeps its own name and spec."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the public names; the root also imports its submodules, as NATTEN's does."""
        source = importlib.import_module(self.source)
        own = {"functional", "modules", "context", "utils"} if module.__name__ == "natten" else set()
        for name in source.__all__:
            if name not in own:
                setattr(module, name, getattr(source, name))
        module.__doc__ = source.__doc__
        module.__file__ = source.__file__
        if module.__name__ in ("natten", "natten.version"):
            module.__version__ = self.version  # type: ignore[attr-defined]
        if module.__name__ == "natten":
            module.__all__ = [name for name in source.__all__ if name not in own]  # type: ignore[attr-defined]
            for name in self.submodules:
                if not hasattr(module, name) or name in own:
                    importlib.import_module(f"natten.{name}")
        else:
            module.__all__ = source.__all__  # type: ignore[attr-defined]


def is_ours(module: ModuleType) -> bool:
    """Whether a module named natten is the stand-in."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), Loader)


def real_natten(
    path: Sequence[str] | None = None, target: ModuleType | None = None
) -> importlib.machinery.ModuleSpec | None:
    """Where NATTEN itself would come from. A mere folder of that name, without ``__init__.py``, is not it."""
    loaded = sys.modules.get("natten")
    if loaded is not None and not is_ours(loaded):
        return getattr(loaded, "__spec__", None) or importlib.machinery.ModuleSpec("natten", None)
    spec = _found_by_others("natten", path, target)
    return spec if spec is not None and spec.loader is not None and spec.origin is not None else None


def _found_by_others(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        if isinstance(finder, Finder) or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


def _distribution(version: str) -> Any:
    from importlib.metadata import Distribution

    class StandIn(Distribution):
        """Metadata without files."""

        def read_text(self, filename: str) -> str | None:
            summary = "nbhd's stand-in for NATTEN"
            texts = {
                "METADATA": f"Metadata-Version: 2.1\nName: natten\nVersion: {version}\nSummary: {summary}\n",
                "top_level.txt": "natten\n",
            }
            return texts.get(filename)

        def locate_file(self, path: Any) -> Any:
            return os.path.join(os.path.dirname(__file__), path)

    return StandIn()


def installed() -> Finder | None:
    """The finder in place, if there is one."""
    return next((finder for finder in sys.meta_path if isinstance(finder, Finder)), None)


def add(version: str | None) -> Finder:
    """Put a finder in place, or give the one there another version.

    Raises:
        ValueError: NATTEN had no such version, or ``natten`` has been imported as another one.
    """
    finder = installed()
    if finder is not None and version is None:
        return finder
    full, package = resolve(version)
    if finder is None:
        finder = Finder(full, package)
        sys.meta_path.insert(0, finder)
    elif (full, package) != (finder.version, finder.package):
        if "natten" in sys.modules:
            raise ValueError(
                f"natten has been imported already, as {finder.version}: call install() before that, or uninstall()."
            )
        finder.version, finder.package = full, package
    return finder


def remove() -> None:
    """Take the finder away, and the modules it made."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    natten = sys.modules.get("natten")
    if natten is not None and is_ours(natten):
        for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
            del sys.modules[name]


def add_from_environment() -> None:
    """What ``NBHD_NATTEN`` asks for: a version, or ``newest``. A wrong one is said on stderr, and nothing is done."""
    asked = os.environ.get(VARIABLE, "").strip()
    if not asked:
        return
    try:
        add(None if asked == "newest" else asked)
    except ValueError as error:
        print(f"{VARIABLE}={asked!r} is ignored: {error}", file=sys.stderr)
