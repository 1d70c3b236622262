"""How many CPU threads commands use, and how these wait: quotas on made-up control groups, the installed commands."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hear_encoders import threads
from hear_encoders.threads import cpu_quota, usable_cpus, use_threads

ROOT = Path(__file__).parents[1]
V2 = "30 25 0:26 {mounted} {place} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 24 0:29 {mounted} {place} rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


@pytest.fixture
def machine(tmp_path: Path):
    """Make a file system: machine(groups, mounts, files) -> its root."""

    def make(groups: str, mounts: list[str], files: dict[str, str]) -> Path:
        for name, content in {
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": OTHER + "\n".join(mounts) + "\n",
            **files,
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


def test_version_2_in_a_container(machine) -> None:
    """Docker and Kubernetes: the container sees its own group as the root."""
    mounts = [V2.format(mounted="/", place="/sys/fs/cgroup")]
    assert cpu_quota(machine("0::/\n", mounts, {"sys/fs/cgroup/cpu.max": "150000 100000\n"})) == 1.5
    assert cpu_quota(machine("0::/\n", mounts, {"sys/fs/cgroup/cpu.max": "max 100000\n"})) == math.inf


def test_version_2_takes_the_smallest_quota_on_the_way_up(machine) -> None:
    """systemd: CPUQuota= of a slice applies to the services in it."""
    files = {
        "sys/fs/cgroup/user.slice/cpu.max": "50000 20000\n",
        "sys/fs/cgroup/user.slice/a.service/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/user.slice/b.service/cpu.max": "100000 100000\n",
    }
    mounts = [V2.format(mounted="/", place="/sys/fs/cgroup")]
    assert cpu_quota(machine("0::/user.slice/a.service\n", mounts, files)) == 2.5
    assert cpu_quota(machine("0::/user.slice/b.service\n", mounts, files)) == 1
    assert cpu_quota(machine("0::/other.slice\n", mounts, files)) == math.inf


def test_version_1_in_a_container(machine) -> None:
    """Without a namespace of groups: the group's path is the host's, and only its part of the tree is mounted."""
    groups = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n"
    mounts = [V1.format(mounted="/docker/ab", place="/sys/fs/cgroup/cpu,cpuacct")]
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(machine(groups, mounts, files)) == 3
    files["sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"] = "-1\n"
    assert cpu_quota(machine(groups, mounts, files)) == math.inf


def test_version_1_takes_the_smallest_quota_on_the_way_up(machine) -> None:
    files = {}
    for group, quota in {"": -1, "pods/": 50_000, "pods/one/": 200_000}.items():
        files[f"cg/cpu/{group}cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"cg/cpu/{group}cpu.cfs_period_us"] = "100000\n"
    mounts = [V1.format(mounted="/", place="/cg/cpu")]
    assert cpu_quota(machine("4:cpu,cpuacct:/pods/one\n", mounts, files)) == 0.5


def test_both_versions_at_once(machine) -> None:
    """A hybrid hierarchy: version 2 has no controllers there."""
    mounts = [
        V2.format(mounted="/", place="/sys/fs/cgroup/unified"),
        V1.format(mounted="/", place=r"/sys/fs/with\040space"),
    ]
    files = {
        "sys/fs/with space/batch/cpu.cfs_quota_us": "200000\n",
        "sys/fs/with space/batch/cpu.cfs_period_us": "50000\n",
        "sys/fs/cgroup/unified/batch/cgroup.procs": "1\n",
    }
    assert cpu_quota(machine("4:cpu,cpuacct:/batch\n0::/batch\n", mounts, files)) == 4


@pytest.mark.parametrize(
    ("groups", "content"), [("0::/../elsewhere\n", "200000 100000"), ("0::/\n", "junk"), ("junk\n", "1 0"), ("", "")]
)
def test_strange_groups_are_no_error(machine, groups: str, content: str) -> None:
    root = machine(groups, [V2.format(mounted="/", place="/sys/fs/cgroup")], {"sys/fs/cgroup/cpu.max": content})
    assert cpu_quota(root) == (2 if content == "200000 100000" else math.inf)


def test_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cpus"), [(math.inf, 4), (2.0, 2), (2.1, 3), (0.3, 1), (64.0, 4)])
def test_usable_cpus_are_the_fewer_of_affinity_and_quota(monkeypatch, quota: float, cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5, 9}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert usable_cpus() == cpus


def test_commands_lower_torchs_threads_but_keep_the_users_choice(monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    try:
        for requested, own, environment, expected in [
            (None, 5, None, 2),
            (None, 1, None, 1),
            (None, 5, "5", 5),
            (3, 1, None, 3),
        ]:
            torch.set_num_threads(own)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if environment:
                monkeypatch.setenv("OMP_NUM_THREADS", environment)
            use_threads(requested)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


COMMAND = "import sys; from hear_encoders.cli.entry import hear_embed; assert 'torch' not in sys.modules; {}"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "KMP"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP prints its settings on Linux")
def test_threads_of_the_command_wait_passively_unless_the_user_decides() -> None:
    code = COMMAND.format("sys.argv[1:] = ['--version']; hear_embed()")
    shown = python(code, OMP_DISPLAY_ENV="TRUE").stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
    shown = python(code, OMP_DISPLAY_ENV="TRUE", OMP_WAIT_POLICY="ACTIVE").stderr
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in shown


def test_importing_the_packages_sets_nothing() -> None:
    process = python(
        "import os; before = dict(os.environ)\n"
        "import hear_encoders.threads, hear_encoders.cli.entry, hear_audiomaepp, hear_axlstm, hear_encoders\n"
        "assert dict(os.environ) == before"
    )
    assert process.returncode == 0, process.stderr


def test_names_of_the_package_are_imported_on_use() -> None:
    process = python(
        "import sys, hear_encoders\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "assert set(hear_encoders.__all__) <= set(dir(hear_encoders))\n"
        "from hear_encoders import *\n"
        "assert Embedder is hear_encoders.embedder.Embedder and preset('axlstm_tiny').dim == 192\n"
        "assert all(hasattr(hear_encoders, name) for name in hear_encoders.__all__)\n"
        "try: hear_encoders.nosuch\n"
        "except AttributeError as error: print(error)"
    )
    assert (process.stdout, process.stderr) == ("module 'hear_encoders' has no attribute 'nosuch'\n", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_interrupted_import_is_one_line() -> None:
    interrupt = (
        "import importlib.abc, os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(hear_embed())"
    )
    process = python(COMMAND.format(f"exec({interrupt!r})"))
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "hear-embed: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_interruption_while_the_model_loads_is_one_line(monkeypatch, capsys) -> None:
    from hear_encoders.cli import embed, entry

    monkeypatch.setattr(embed, "main", lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
    try:
        assert entry._run("hear-embed", "hear_encoders.cli.embed") == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "hear-embed: interrupted\n"
