from __future__ import annotations

import os
from pathlib import Path

import pytest

from cifar10_tl.io import atomic_write, atomic_write_text


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "one")
    atomic_write_text(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            assert path.read_text() == "old", "a reader meets the old file while the new one is written"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_it_is_as_shared_as_any_other_file(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "atomic", "")
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "atomic").st_mode == os.stat(tmp_path / "plain").st_mode
