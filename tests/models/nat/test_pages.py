"""The snippets of docs/checkpoints.md and docs/heads.md run, on small files of the names they use."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DinatConfig

from nbhd.models import NatConfig, NatForImageClassification
from tests.models.nat.original import OriginalNat

DOCS = Path(__file__).parents[3] / "docs"
PAGES = ["checkpoints.md", "heads.md"]
SNIPPETS = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S), 1
    )
]
DILATED = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 4], "kernel_size": 3, "dilations": [[1, 2], [4]]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS.parent / "examples" / "photos" / "church.jpg", tmp_path)
    torch.save(OriginalNat(8, [1, 1, 1, 1], [1, 2, 2, 4], 3, num_classes=6).state_dict(), "nat_tiny.pth")
    torch.save(OriginalNat(**DILATED, num_classes=6).state_dict(), "my_dinat.pth")
    folder = tmp_path / "dinat-folder"
    DinatConfig(**DILATED, layer_scale_init_value=0.0).save_pretrained(folder)
    weights = NatForImageClassification(NatConfig(**DILATED)).state_dict()
    torch.save({name.replace("nat.", "dinat."): value for name, value in weights.items()}, folder / "pytorch_model.bin")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{page}-{n}" for page, n, _ in SNIPPETS])
def test_snippet(page: str, number: int, code: str) -> None:
    try:
        exec(compile(code, f"{page}, snippet {number}", "exec"), {"__name__": "snippet"})
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        pytest.skip("this transformers' image processor asks for torchvision, without need")
