"""Run transformers' own common tests, of the installed version, on our classes: ``make test-hf``.

The tests of models, configurations, backbones and image processors that every model of transformers must pass are in
its source distribution, not in its wheel. This fetches that with pip, lays its ``tests`` folder out under
``build/hf/VERSION`` with what the distribution leaves out, adds the classes below, and runs them offline:

    modeling.py            what the common tests are told of NatModel, NatForImageClassification and NatBackbone
    image_processing.py    the same of NatImageProcessor
    report.py              the counts, and every skipped test with its reason

Arguments are pytest's. Exit code 0 only if nothing failed and something passed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PHOTO = next((ROOT / "examples" / "photos").glob("*.jp*g"))

#: Files that the common tests import and the distribution leaves out, as little of them as these tests need.
LEFT_OUT = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    # Values that differ from every default; each must survive the configuration's way to the disk.
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False, 'output_hidden_states': True, 'output_attentions': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5, 'architectures': ['NatModel'], 'id2label': {0: 'label'},\n"
        "    'label2id': {'label': '0'}, 'problem_type': 'regression',\n"
        "}\n"
    ),
    "tests/utils/tiny_model_summary.json": "{}",
    "tests/models/__init__.py": "",
    "tests/models/nat/__init__.py": "",
    # Pictures come from the hub there; any photograph does.
    "utils/fetch_hub_objects_for_ci.py": f"def url_to_local_path(url):\n    return {str(PHOTO)!r}\n",
}
#: Ours, and where they go.
OURS = {
    "modeling.py": "tests/models/nat/test_modeling_nat.py",
    "image_processing.py": "tests/models/nat/test_image_processing_nat.py",
    "report.py": "conftest.py",
}


def fetch(version: str, folder: Path) -> None:
    """The ``tests`` folder of the source distribution of transformers, into ``folder``."""
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*command, "--no-binary", "transformers", "--dest", archives, f"transformers=={version}"], check=True
    )
    with tarfile.open(next(archives.glob("transformers-*.tar.gz"))) as archive:
        inside = f"transformers-{version}/"
        for member in archive.getmembers():
            if member.name.startswith(f"{inside}tests/"):
                member.name = member.name.removeprefix(inside)
                archive.extract(member, folder, filter="data")
    shutil.rmtree(archives)


def lay_out(folder: Path) -> None:
    """Everything the common tests need, beside them."""
    for name, text in LEFT_OUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for source, target in OURS.items():
        shutil.copyfile(HERE / source, folder / target)
    # One of the mixins loads transformers from the place where it stands in a clone.
    (folder / "src").mkdir(exist_ok=True)
    link = folder / "src" / "transformers"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(transformers.__file__).parent)


def main() -> int:
    version = transformers.__version__
    folder = ROOT / "build" / "hf" / version
    if not (folder / "tests" / "test_modeling_common.py").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fetch(version, folder)
    lay_out(folder)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", os.devnull]
    return subprocess.run(
        [*command, "tests/models/nat", *sys.argv[1:]], cwd=folder, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
