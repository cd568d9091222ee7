"""Makes the README's picture of the command line from a real run: python docs/pictures.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["classify", "examples/photos", "--top-k", "2"]


def main() -> None:
    """Run the command with colours and write docs/classify.svg."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "88", "TERM": "xterm-256color"}
    run = subprocess.run(
        [sys.executable, "-m", "nbhd", *COMMAND], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=88, file=nowhere)
        console.print(Text("$ nbhd " + " ".join(COMMAND)))
        console.print(Text.from_ansi(run.stdout))
        console.save_svg(str(ROOT / "docs" / "classify.svg"), title="nbhd")


if __name__ == "__main__":
    main()
