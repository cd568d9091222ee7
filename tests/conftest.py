from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_classifier


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small image classifier with random weights and its image processor."""
    return write_classifier(tmp_path_factory.mktemp("models") / "tiny")
