"""Files, folders and patterns become a list of files, in order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nbhd.tasks.inputs import find_inputs, without_duplicates
from tests.files import as_ordinary_user


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.jpg", "sub/deep/d.png", "sub/c.jpg", "sub.jpg/x", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(*names: str) -> list[str]:
    found = list(find_inputs(names))
    assert [item.error for item in found] == [None] * len(found)
    return [item.path.replace(os.sep, "/") for item in found]


def test_files_stay_in_the_order_they_are_named(folder: Path) -> None:
    assert paths("b.jpg", "z.txt", "a.jpg") == ["b.jpg", "z.txt", "a.jpg"]


def test_a_folder_gives_everything_below_it_by_name(folder: Path) -> None:
    assert paths(".") == ["./a.jpg", "./b.jpg", "./sub/c.jpg", "./sub/deep/d.png", "./sub.jpg/x", "./z.txt"]
    assert paths("sub/") == ["sub/c.jpg", "sub/deep/d.png"]


def test_patterns(folder: Path) -> None:
    assert paths("*.txt") == ["z.txt"]
    assert paths("[ab].jpg") == ["a.jpg", "b.jpg"]
    assert paths("**/*.jpg") == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert paths("sub/**") == ["sub/c.jpg", "sub/deep/d.png"]


def test_a_pattern_enters_the_folders_it_matches(folder: Path) -> None:
    assert paths("sub*") == ["sub/c.jpg", "sub/deep/d.png", "sub.jpg/x"]


def test_a_name_that_exists_is_not_a_pattern(folder: Path) -> None:
    (folder / "[ab].jpg").touch()
    assert paths("[ab].jpg") == ["[ab].jpg"]


@pytest.mark.parametrize(
    "name", ["with space.jpg", "größe 写真 🏔.jpg", "-dash.jpg", "new\nline.jpg", "'\"$;&.jpg", "[bold].jpg"]
)
def test_unusual_names(folder: Path, name: str) -> None:
    try:
        (folder / name).touch()
    except OSError:
        pytest.skip("this file system does not take the name")
    assert paths(name) == [name]
    assert f"./{name}" in paths(".")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not text")
def test_names_that_are_not_text(folder: Path) -> None:
    name = b"caf\xe9.jpg"
    (folder / os.fsdecode(name)).touch()
    assert os.fsencode(paths(os.fsdecode(name))[0]) == name


def test_hidden_files_are_passed_over_unless_named(folder: Path) -> None:
    (folder / ".DS_Store").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "index").touch()
    assert not any(".DS_Store" in path or ".git" in path for path in paths("."))
    assert paths(".DS_Store", ".git") == [".DS_Store", ".git/index"]


def test_links_are_followed_and_loops_end(folder: Path) -> None:
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "elsewhere").symlink_to(folder / "sub" / "deep")
    found = paths(".")
    assert found.count("./elsewhere/d.png") == 1
    assert not any("loop" in path for path in found)


def test_a_broken_link_is_an_input(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("gone")
    assert paths("link.jpg") == ["link.jpg"]


def test_what_is_not_there_comes_back_with_a_reason(folder: Path) -> None:
    (folder / "empty").mkdir()
    found = list(find_inputs(["none.jpg", "a.jpg", "*.bmp", "empty", "a.jpg/b", "", "x" * 5000]))
    assert [(item.path, item.error) for item in found[:-1]] == [
        ("none.jpg", "no such file or folder"),
        ("a.jpg", None),
        ("*.bmp", "no file matches this pattern"),
        ("empty", "no files in this folder"),
        ("a.jpg/b", "no such file or folder"),
        ("", "the name is empty; the current folder is '.'"),
    ]
    assert found[-1].error is not None
    assert "too long" in found[-1].error


def test_named_or_found(folder: Path) -> None:
    assert next(find_inputs(["a.jpg"])).named
    assert not next(find_inputs(["sub"])).named


def test_each_file_once_in_its_first_place(folder: Path) -> None:
    kept, repeated = without_duplicates(find_inputs(["b.jpg", ".", "./b.jpg", str(folder / "a.jpg")]))
    assert [Path(item.path).as_posix() for item in kept][:2] == ["b.jpg", "a.jpg"]
    assert len(kept) == 6
    assert repeated == 3


def test_a_folder_that_cannot_be_listed(folder: Path) -> None:
    secret = folder / "secret"
    secret.mkdir()
    (secret / "a.jpg").touch()
    secret.chmod(0)
    try:
        with as_ordinary_user(folder):
            found = list(find_inputs(["a.jpg", "secret", "secret/a.jpg", "b.jpg"]))
    finally:
        secret.chmod(0o755)
    assert [(item.path, item.error) for item in found] == [
        ("a.jpg", None),
        ("secret", "cannot list this folder: permission denied"),
        ("secret/a.jpg", "permission denied"),
        ("b.jpg", None),
    ]
