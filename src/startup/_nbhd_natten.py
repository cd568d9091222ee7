"""Run when Python starts and ``NBHD_NATTEN`` is set: puts nbhd's import hook in place, without importing nbhd.

``NBHD_NATTEN=0.17.5`` makes ``import natten`` find nbhd's stand-in for that version where NATTEN itself is absent;
``newest`` stands for the newest. Unset, this file is not even read.
"""

import importlib.util
import os
import sys

_NAME = "nbhd.compat.natten._finder"


def _start() -> None:
    package = importlib.util.find_spec("nbhd")  # finds it and does not import it
    for folder in (package.submodule_search_locations or ()) if package else ():
        spec = importlib.util.spec_from_file_location(_NAME, os.path.join(folder, *_NAME.split(".")[1:]) + ".py")
        if spec is None or spec.loader is None or not os.path.exists(spec.origin or ""):
            continue
        finder = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = finder
        spec.loader.exec_module(finder)
        finder.add_from_environment()
        return


_start()
