"""Atomic writes: permissions, errors of the disk, and what killed processes leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hear_encoders.files import atomic_write, remove_leftovers, write_or_check_settings

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions, signals and locks of POSIX")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_overwritten_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(mode)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == mode


def test_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "out") as file:
        file.write(b"new")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_is_named_with_the_file(tmp_path: Path, wrapped: bool) -> None:
    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if wrapped:  # as torch.save does
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
            raise

    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'out'}'"),
        atomic_write(tmp_path / "out"),
    ):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_come_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothere"), atomic_write(tmp_path / "out"):
        open(tmp_path / "nothere")  # noqa: SIM115
    with pytest.raises(RuntimeError, match=r"^other$"), atomic_write(tmp_path / "out"):
        raise RuntimeError("other")


WRITER = """
import sys
from hear_encoders.files import atomic_write

with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    sys.stdin.readline()
"""


TIDY = "import sys; from hear_encoders.files import remove_leftovers; remove_leftovers(sys.argv[1])"


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, tmp_path / name], **options) for name in ("killed", "living")]
    for process in processes:
        assert process.stdout.readline() == "begun\n"
    killed, living = processes
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".notes.tmp").touch()  # not ours
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    (left,) = [path.name for path in tmp_path.iterdir() if path.name != ".notes.tmp"]
    assert left.startswith(f".{living.pid}-")
    living.communicate("go on\n")
    assert living.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "living"]


def test_a_run_that_removes_leftovers_does_not_disturb_one_that_records_its_settings(tmp_path, monkeypatch) -> None:
    fsync = os.fsync

    def fsync_while_another_run_tidies(descriptor: int) -> None:
        fsync(descriptor)
        subprocess.run([sys.executable, "-c", TIDY, tmp_path], check=True)

    monkeypatch.setattr("hear_encoders.files.os.fsync", fsync_while_another_run_tidies)
    write_or_check_settings(tmp_path / "settings.json", {"seed": 1}, holds="a run", advice="choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
