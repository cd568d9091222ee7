"""Build the C++ tests under the sanitizers and run them: ``make sanitize``.

    python csrc/tests/check.py [--sets "avx2;baseline"] [--cases N] [--build FOLDER]

Address and undefined-behaviour sanitizers in one build, the thread sanitizer in another, each for all instruction sets
of this machine's processor family unless some are named; ctest leaves out those that its processor has not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
#: Random geometries per instruction set; the plain build runs 10,000 (``ctest --test-dir build/cpu``).
CASES = {"address": 1500, "thread": 300}


def main() -> int:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None or not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        print("check: no cmake or no C++ compiler, so the C++ tests were not run.")
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", help="instruction sets, with semicolons between them")
    parser.add_argument("--cases", type=int, help="random geometries per instruction set")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "check")
    given = parser.parse_args()
    for name, sanitizer in SANITIZERS.items():
        folder = given.build / name
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DNBHD_SANITIZE={sanitizer}"]
        configure += [f"-DNBHD_FUZZ_CASES={given.cases or CASES[name]}"]
        configure += [f"-DNBHD_SETS={given.sets}"] if given.sets else []
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", str(folder), "-j2"], check=True)
        ctest = str(Path(cmake).with_name("ctest"))
        environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
        subprocess.run([ctest, "--test-dir", str(folder), "--output-on-failure"], check=True, env=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
