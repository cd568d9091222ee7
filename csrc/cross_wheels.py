"""Wheels for other platforms than this one: `make cross-wheels`, or

    python csrc/cross_wheels.py [windows] [macos] [linux-arm]        # all of them without a name; into dist/

The core is compiled by Zig's Clang (csrc/cmake/zig.cmake), everything else is the same on all platforms. A wheel is
looked into before it counts: the library is there, is for the right processor, and has the functions of the interface.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


@dataclass(frozen=True)
class Platform:
    """Zig's name for it, Python's, the wheel's, that of the library, and how a file for its processor begins."""

    target: str
    host: str
    tag: str
    library: str
    begins: re.Pattern[bytes]


PLATFORMS = {
    "windows": Platform(
        "x86_64-windows-gnu", "win-amd64", "win_amd64", "libnbhd_cpu.dll",
        re.compile(rb"MZ.{58}.{4}.{0,1024}?PE\0\0\x64\x86", re.DOTALL),
    ),
    "macos": Platform(
        "aarch64-macos.11.0", "macosx-11.0-arm64", "macosx_11_0_arm64", "libnbhd_cpu.dylib",
        re.compile(rb"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
    ),
    "linux-arm": Platform(
        "aarch64-linux-gnu.2.28", "linux-aarch64", "manylinux_2_28_aarch64", "libnbhd_cpu.so",
        re.compile(rb"\x7fELF\x02\x01.{12}\xb7\x00", re.DOTALL),
    ),
}  # fmt: skip


def build(platform: Platform) -> Path:
    """The wheel, in dist/."""
    given = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "csrc/cmake/zig.cmake", "NBHD_TARGET": platform.target,
        "NBHD_PYTHON": sys.executable,
    }  # fmt: skip
    arguments = ";".join(f"-D{name}={value}" for name, value in given.items())
    # without it the wheel would be called one of this platform's
    environment = os.environ | {"_PYTHON_HOST_PLATFORM": platform.host}
    command = [sys.executable, "-m", "build", "--wheel", "--installer", "pip", "--outdir", str(DIST)]
    before = set(DIST.glob("*.whl"))
    subprocess.run([*command, "-C", f"cmake.args={arguments}", str(ROOT)], check=True, env=environment)
    (made,) = set(DIST.glob(f"*-{platform.host.replace('-', '_').replace('.', '_')}.whl")) - before or before
    tags = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform.tag, str(made)]
    named = subprocess.run(tags, check=True, capture_output=True, text=True).stdout.split()[-1]
    return DIST / named


def functions() -> set[str]:
    """Those of the C interface."""
    header = (ROOT / "csrc/include/nbhd.h").read_text(encoding="utf-8")
    return set(re.findall(r"^NBHD_API [^;(]*?(nbhd_\w+)\(", header, re.MULTILINE))


def check(wheel: Path, platform: Platform) -> None:
    """Ends the program where the wheel is not what it is called."""
    with zipfile.ZipFile(wheel) as archive:
        name = f"nbhd/_native/{platform.library}"
        if name not in archive.namelist():
            sys.exit(f"{wheel.name} has no {name}.")
        library = archive.read(name)
    if not platform.begins.match(library):
        sys.exit(f"{name} in {wheel.name} is not for {platform.target}.")
    missing = sorted(f for f in functions() if not re.search(rb"\0_?" + f.encode() + rb"\0", library))
    if missing:
        sys.exit(f"{name} in {wheel.name} lacks {', '.join(missing)}.")
    print(f"{wheel.name}: {len(library) / 1e6:.1f} MB of library, {len(functions())} functions")


def main() -> None:
    names = sys.argv[1:] or list(PLATFORMS)
    if unknown := [name for name in names if name not in PLATFORMS]:
        sys.exit(f"a platform must be one of {', '.join(PLATFORMS)}, got {', '.join(unknown)}.")
    for name in names:
        check(build(PLATFORMS[name]), PLATFORMS[name])


if __name__ == "__main__":
    main()
