"""The folder of a run: made, locked, found again, and what it says where that cannot be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from steepest import files
from steepest.errors import UserError
from steepest.train import RunConfig, Runtime, checkpoints, run
from steepest.train.folder import RunFolder, locate, opened

from .conftest import MakeConfig
from .test_config import PINNED

SAVING = Runtime(threads=1, checkpoint_every=5)


@pytest.mark.parametrize("place", ["file", "file/deeper", "link"])
def test_a_runs_directory_that_is_none(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with (
        pytest.raises(UserError, match=r"cannot be written to: .*; choose another runs directory"),
        opened(tmp_path / place, PINNED),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_at_the_beginning_leaves_no_half_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path, PINNED) as folder:
        folder.config.unlink()
    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(UserError, match="cannot be written to: the disk is full"),
        opened(tmp_path, PINNED),
    ):
        pass
    monkeypatch.undo()
    assert sorted(os.listdir(folder.path)) == ["checkpoints", "lock"]
    with opened(tmp_path, PINNED) as folder:
        assert RunConfig.from_toml(folder.config) == PINNED


def test_a_lock_holds_for_one_and_ends_with_it(tmp_path: Path) -> None:
    with opened(tmp_path, PINNED):
        with (
            pytest.raises(UserError, match=f"Another process \\({os.getpid()} on "),
            opened(tmp_path, PINNED),
        ):
            pass
        with opened(tmp_path, PINNED, shared=True) as folder:
            assert folder.config.exists()
    with opened(tmp_path, PINNED):
        pass


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked .*, so see to it that no other process"),
        opened(tmp_path, PINNED) as folder,
    ):
        assert folder.config.exists()


def test_only_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    with opened(tmp_path, PINNED) as folder:
        ours = []
        for path in (folder.config, folder.checkpoints / "step-000000001.pt"):
            with files.replacing(path) as temporary:  # a process that dies here leaves it
                temporary.write_text(path.name)
                ours.append(temporary)
        theirs = [folder.path / ".gitignore", folder.path / ".config.toml.swp"]
        theirs.append(folder.checkpoints / ".nfs000000000123abcd00000001")
        folder.config.unlink()
    for path in ours + theirs:
        path.write_text("")
    with opened(tmp_path, PINNED):
        assert [path.exists() for path in ours + theirs] == [False, False, True, True, True]


@pytest.mark.parametrize("content", ["", "[data]\ncor", "[training]\nseed = 1\n", "\0"])
def test_a_damaged_config_is_a_sentence(content: str, tmp_path: Path) -> None:
    with opened(tmp_path, PINNED) as folder:
        pass
    folder.config.write_text(content)
    with pytest.raises(UserError, match=r"config\.toml"):
        locate(tmp_path, PINNED)
    assert folder.config.read_text() == content


def test_a_folder_that_was_moved_gets_no_result_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is gone; the folder of a run cannot be moved"):
        RunFolder(tmp_path / "moved").write_result({})
    assert os.listdir(tmp_path) == []


def test_a_folder_can_move_between_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    whole = run(config, tmp_path / "whole", runtime=SAVING)
    folder = tmp_path / "whole" / whole["hash"]
    (folder / "result.json").unlink()
    moved = tmp_path / "elsewhere" / whole["hash"]
    moved.parent.mkdir()
    folder.rename(moved)
    (tmp_path / "link").symlink_to(moved.parent)
    again = run(config, tmp_path / "link", runtime=SAVING)
    assert again["val_loss"] == whole["val_loss"]
    assert json.loads((moved / "environment.json").read_text())["sessions"][-1]["step"] == 30


@pytest.mark.parametrize("name", ["result.json", "environment.json"])
def test_damaged_notes_are_a_sentence(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=10, every=5)
    result = run(config, tmp_path, runtime=SAVING)
    folder = tmp_path / result["hash"]
    (folder / "result.json").unlink()
    (folder / name).write_text('{"x')
    with pytest.raises(UserError, match=rf"{name} is damaged; restore it, or remove it"):
        run(config, tmp_path, runtime=SAVING)
    (folder / name).unlink()
    assert run(config, tmp_path, runtime=SAVING)["val_loss"] == result["val_loss"]
    assert checkpoints.newest(folder / "checkpoints") is not None
