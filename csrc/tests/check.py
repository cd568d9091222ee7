"""Build the C++ tests under the sanitizers and run them: ``make sanitize``.

    python csrc/tests/check.py [build folder = build/check]

Address and undefined-behaviour sanitizers in one build, the thread sanitizer in another, each for all instruction sets
of this machine's processor family; ctest leaves out those that its processor has not.
"""

from __future__ import annotations

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
    build = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "check"
    for name, sanitizer in SANITIZERS.items():
        folder = build / name
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DNBHD_SANITIZE={sanitizer}"]
        subprocess.run([*configure, f"-DNBHD_FUZZ_CASES={CASES[name]}"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", str(folder), "-j2"], check=True)
        ctest = str(Path(cmake).with_name("ctest"))
        environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
        subprocess.run([ctest, "--test-dir", str(folder), "--output-on-failure"], check=True, env=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
