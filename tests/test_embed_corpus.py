"""`hear-embed-corpus` on Ray: every recording once, whatever is killed, from and to object storage.

`.ci/run` installs the extras and runs this file, in one process: its tests share a cluster of three nodes. The cluster
and each worker's import of PyTorch take most of the time. `KILLS` and `KILL_SEED` set how many kills are tried, and
when; the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import soundfile
from conftest import SMALL_CONFIGS

from hear_encoders import build_encoder, save_checkpoint
from hear_encoders.cli.corpus_inputs import plan
from hear_encoders.cli.embed import main as hear_embed
from hear_encoders.cli.embed_corpus import main

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
moto = pytest.importorskip("moto.server")

ROOT = Path(__file__).parents[1]
FILES = 40
BUCKET = "s3://corpus"
OBJECT_STORE = {"object_store_memory": 150 << 20}
HANG_S = 240  # a run takes 20 s on a quiet machine


@pytest.fixture(scope="module")
def s3():
    """An S3 server on loopback, with a bucket; Ray's processes find it through the environment."""
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        storage = s3fs.S3FileSystem(skip_instance_cache=True)
        storage.mkdir("corpus")
        yield storage
    server.stop()


class Nodes:
    """A cluster of a head, on which nothing runs, and nodes of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        checks = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": checks, **OBJECT_STORE},
        )
        self.address = self.cluster.address
        ray.init(address=self.address, log_to_driver=False)  # while the head is the only node to connect to
        self.nodes = [self._add(), self._add()]

    def _add(self):
        return self.cluster.add_node(num_cpus=1, **OBJECT_STORE)

    def replace(self, index: int) -> None:
        """Kill a node with all its processes, and add another."""
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)
        self.nodes.append(self._add())


@pytest.fixture(scope="module")
def cluster(s3):
    nodes = Nodes()
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, build_encoder(SMALL_CONFIGS["audiomaepp"], seed=1))
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(FILES):
        noise = np.random.default_rng(number).normal(0, 0.1, 8000 + 2000 * number)
        soundfile.write(folder / f"{number:02d}.flac", noise, 16000)
    return folder


@pytest.fixture(scope="module")
def arguments(recordings, weights) -> list[str]:
    """The command without --output: about 30 parts in 10 tasks."""
    limits = ["--part-seconds", "3", "--task-mb", "0.4", "--workers", "2"]
    return [str(recordings), "--weights", str(weights), *limits]


@pytest.fixture(scope="module")
def undisturbed(cluster, arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([*arguments, "-o", str(output)]) == 0
    return output


def rows(output: Path):
    """Read the folder as one table, sorted; check that each recording is there once."""
    table = parquet.read_table(output).sort_by("path")
    paths = table["path"].to_pylist()
    assert len(set(paths)) == len(paths) == FILES
    return table


def test_embeddings_are_those_of_hear_embed(undisturbed, recordings, weights, tmp_path):
    reference = tmp_path / "reference.parquet"
    assert hear_embed([str(recordings), "-o", str(reference), "--weights", str(weights)]) == 0
    table, expected = rows(undisturbed), parquet.read_table(reference).sort_by("path")
    assert table["path"].to_pylist() == expected["path"].to_pylist()
    got, expected = (np.stack(each["embedding"].to_numpy()) for each in (table, expected))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert len(list(undisturbed.glob("part-*.parquet"))) > 15


def processes(name: str) -> list[psutil.Process]:
    """Return this user's Ray processes at work on a stage."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = (process.info["cmdline"] or [""])[0]
        if command.startswith("ray::") and name in command:
            found.append(process)
    return found


def kill(kind: str, cluster: Nodes, chance: random.Random, ended: threading.Event) -> str:
    """Kill one thing, and return what; "nothing" if the run ends before there is one."""
    if kind == "node":
        cluster.replace(chance.randrange(len(cluster.nodes)))
        return "a node"
    while not ended.is_set():
        found = processes({"actor": "MapWorker(MapBatches(Embed))", "task": "MapBatches(decode)"}[kind])
        if found:
            process = chance.choice(found)
            process.send_signal(signal.SIGKILL)
            return f"{kind} {process.pid}"
        time.sleep(0.01)
    return "nothing"


def wait_for_part(output: Path, running) -> None:
    deadline = time.monotonic() + HANG_S
    while running() and not list(output.glob("part-*.parquet")):
        assert time.monotonic() < deadline, "no part was written"
        time.sleep(0.02)


def test_killed_actors_tasks_and_nodes_lose_and_repeat_nothing(cluster, arguments, undisturbed, tmp_path):
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 1_000_000))
    chance = random.Random(seed)
    expected = rows(undisturbed)
    killed = []
    moment_s = 5.0  # some kills come before the first part, as starting workers takes most of the time
    for trial in range(int(os.environ.get("KILLS", "3"))):
        output, codes, ended = tmp_path / f"{trial}", [], threading.Event()

        def embed(output=output, codes=codes, ended=ended) -> None:
            try:
                codes.append(main([*arguments, "-o", str(output)]))
            finally:
                ended.set()

        run = threading.Thread(target=embed, daemon=True)  # nodes can only be added by the main thread
        run.start()
        kind = ("actor", "task", "node")[trial % 3]
        time.sleep(chance.uniform(0, moment_s))
        killed.append(kill(kind, cluster, chance, ended))
        print(f"seed {seed}, trial {trial}: killed {killed[-1]}")
        run.join(HANG_S)
        assert codes == [0], f"seed {seed}, trial {trial}: {killed}"
        assert rows(output).equals(expected), f"seed {seed}, trial {trial}: {killed}"
    assert killed.count("nothing") <= len(killed) // 3, killed  # the run had ended


def test_killed_driver_is_started_again_at_once(cluster, arguments, undisturbed, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "hear_encoders.cli.embed_corpus", *arguments, "-o", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen([*command, "--address", cluster.address], env=environment)
    try:
        wait_for_part(output, lambda: driver.poll() is None)
    finally:
        driver.kill()
        driver.wait()
    assert len(list(output.glob("part-*.parquet"))) < len(list(undisturbed.glob("part-*.parquet")))
    assert main([*arguments, "-o", str(output)]) == 0
    assert rows(output).equals(rows(undisturbed))
    time.sleep(2)  # Ray may need a moment to end what the killed driver had started
    assert rows(output).equals(rows(undisturbed))


def test_object_storage_is_read_and_written(cluster, s3, recordings, arguments, undisturbed, capsys):
    for path in recordings.iterdir():
        s3.put_file(str(path), f"corpus/in/{path.name}")
    s3.pipe_file("corpus/in/junk.wav", b"no sound")
    command = [f"{BUCKET}/in/", *arguments[1:], "-o", f"{BUCKET}/out"]
    assert main(command) == 1
    assert f"failed: {BUCKET}/in/junk.wav: not readable as audio" in capsys.readouterr().err
    s3.invalidate_cache()
    table = parquet.read_table("corpus/out", filesystem=s3).sort_by("path")
    assert table["path"].to_pylist() == [f"{BUCKET}/in/{number:02d}.flac" for number in range(FILES)]
    expected = rows(undisturbed)
    np.testing.assert_allclose(*(np.stack(each["embedding"].to_numpy()) for each in (table, expected)), atol=1e-5)
    parts = s3.glob("corpus/out/part-*.parquet")
    gone = set(parts[::3])
    s3.rm(list(gone))
    assert main(command) == 0
    assert f"{FILES - len(gone)} already there" in capsys.readouterr().out or len(gone) < FILES
    s3.invalidate_cache()
    assert s3.glob("corpus/out/part-*.parquet") == parts
    assert parquet.read_table("corpus/out", filesystem=s3).sort_by("path").equals(table)
    assert main([*command, "--half"]) == 2
    assert f"{BUCKET}/out holds embeddings made with half = False, now True" in capsys.readouterr().err


def test_a_later_run_embeds_new_files_only_and_refuses_other_settings(
    cluster, arguments, undisturbed, tmp_path, capsys
):
    shutil.copytree(undisturbed, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    soundfile.write(tmp_path / "new.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    command = [str(tmp_path / "new.wav"), *arguments, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert f"1 recording embedded, {FILES} already there" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert parquet.read_table(tmp_path / "out").num_rows == FILES + 1
    assert main(command) == 0
    assert f"nothing new, {FILES + 1} recordings already there" in capsys.readouterr().out
    assert main([*command, "--framing", "reference"]) == 2
    assert "holds embeddings made with framing = 'exact', now 'reference'" in capsys.readouterr().err
    assert main([*arguments, "--weights", "", "-o", str(tmp_path / "out")]) == 2
    assert "holds embeddings made with weights = " in capsys.readouterr().err


def test_impossible_requests_fail_before_any_work(cluster, arguments, recordings, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), *arguments[1:], "-o", str(tmp_path / "out")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "_plan.json").write_text("{}")
    assert main([*arguments, "-o", str(tmp_path / "old")]) == 2
    assert "was made by torchrun" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.parquet").write_bytes(b"")
    assert main([*arguments, "-o", str(tmp_path / "other")]) == 2
    assert "holds Parquet files, but no _hear-embed-corpus.json" in capsys.readouterr().err
    (tmp_path / "manifest.csv").write_text(f"path,embedding\n{recordings / '00.flac'},1\n")
    assert main([str(tmp_path / "manifest.csv"), *arguments[1:], "-o", str(tmp_path / "out")]) == 2
    assert "column 'embedding' would take the place" in capsys.readouterr().err


def test_error_of_the_machine_ends_the_run_and_the_next_one_goes_on(cluster, weights, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 600), 16000)
    (tmp_path / "junk.wav").write_bytes(b"no sound")
    output = tmp_path / "out"
    output.mkdir()
    (output / "errors").touch()  # where a folder must be
    command = [str(tmp_path), "-o", str(output), "--weights", str(weights), "--workers", "1"]
    assert main(command) == 1
    assert "error: File exists; what is done is kept: give the same command again" in capsys.readouterr().err
    (output / "errors").unlink()
    assert main(command) == 1
    assert "1 recording failed: see" in capsys.readouterr().err
    assert parquet.read_table(output).num_rows == 1


@pytest.fixture(scope="module", params=["scenes", "half steps"])
def two_rows(request, cluster, weights, tmp_path_factory) -> Path:
    """A folder with two rows, in two files, and an error beside them."""
    folder = tmp_path_factory.mktemp("two")
    for number in range(2):
        samples = np.random.default_rng(number).normal(0, 0.1, 600)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
    (folder / "junk.wav").write_bytes(b"no sound")
    steps = ["--timestamps", "--half"] if request.param == "half steps" else []
    command = [str(folder), "-o", str(folder / "out"), "--weights", str(weights), "--part-seconds", "0.01", *steps]
    assert main(command) == 1
    return folder / "out"


def check(paths: list[str], embeddings: list[list[float]], output: Path) -> None:
    expected = parquet.read_table(output).sort_by("path")
    order = sorted(range(2), key=lambda row: paths[row])
    assert [paths[row] for row in order] == expected["path"].to_pylist()
    np.testing.assert_array_equal(np.array([embeddings[row] for row in order]), expected["embedding"].to_pylist())


def test_duckdb_and_lancedb_read_the_folder_as_documented(two_rows, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "embeddings").symlink_to(two_rows)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(block, namespace)
    rows, sounds = namespace["rows"], namespace["sounds"].to_arrow()
    check([row[0] for row in rows], [row[2] for row in rows], two_rows)
    check(sounds["path"].to_pylist(), sounds["embedding"].to_pylist(), two_rows)
    assert namespace["found"][0]["path"] == rows[0][0]
    ((path, reason),) = namespace["errors"]
    assert path.endswith("junk.wav") and "not readable as audio" in reason


def test_pandas_reads_the_folder(two_rows):
    table = pytest.importorskip("pandas").read_parquet(two_rows)
    check(list(table["path"]), list(table["embedding"]), two_rows)


def test_datasets_reads_the_folder(two_rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("parquet", data_files=f"{two_rows}/*.parquet", split="train", cache_dir=str(tmp_path))
    check(list(table["path"]), list(table["embedding"]), two_rows)


def test_shards_for_pretraining_are_the_same_on_ray(cluster, recordings, tmp_path):
    from training.corpora.prepare import main as prepare

    for name, options in {"here": [], "ray": ["--ray"]}.items():
        assert prepare([str(recordings), str(tmp_path / name), "--shard-records", "5", *options]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir() if path.suffix in (".tar", ".json")}
    assert len(files) > 8
    for name, content in files.items():
        assert (tmp_path / "ray" / name).read_bytes() == content, name


def test_a_dataset_saved_to_disk_is_read(recordings, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(recordings.iterdir())[:3]
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    datasets.Dataset.from_dict({"audio": audio, "label": [5, 6, 7]}).save_to_disk(tmp_path / "saved")
    (task,) = plan([str(tmp_path / "saved")], exclude=[], column=None, done=[], task_mb=1).tasks
    found = list(task.recordings())
    assert [recording.source for recording in found] == [path.read_bytes() for path in files]
    assert [(Path(recording.path).name.split("#")[1], recording.extras) for recording in found] == [
        (str(row), {"label": 5 + row}) for row in range(3)
    ]


def test_the_changelogs_way_to_go_on_from_an_old_folder_finds_what_is_missing(undisturbed, recordings, tmp_path):
    import duckdb

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    copy, select = re.search(r"```sql\n(.*?);  --.*?\n.*?(SELECT path, embedding.*?);", text, flags=re.DOTALL).groups()
    (tmp_path / "old").mkdir()
    names = sorted(path.name for path in undisturbed.glob("*.parquet"))
    for name in names[:10]:
        table = parquet.read_table(undisturbed / name).drop_columns("duration_s")  # as in an old folder
        parquet.write_table(table, tmp_path / "old" / name)
    (tmp_path / "new").symlink_to(undisturbed)
    here = {
        "/data/recordings": str(recordings),
        ".wav": ".flac",
        "'old/": f"'{tmp_path}/old/",
        "'new/": f"'{tmp_path}/new/",
    }
    for before, now in {**here, "missing.csv": f"{tmp_path}/missing.csv"}.items():
        copy, select = copy.replace(before, now), select.replace(before, now)
    duckdb.sql(copy)
    old = parquet.read_table(tmp_path / "old").num_rows
    lines = (tmp_path / "missing.csv").read_text().splitlines()
    assert lines[0] == "path" and 0 < old < FILES and len(lines) == 1 + FILES - old
    assert len(duckdb.sql(select).fetchall()) == old + FILES


def test_without_a_cluster_ray_is_started_on_this_machine_and_stopped(weights, recordings, tmp_path):
    """In a process of its own, since this one has joined a cluster."""
    command = [sys.executable, "-m", "hear_encoders.cli.embed_corpus", str(recordings / "0*"), "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*command, "--weights", str(weights)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, parquet.read_table(tmp_path / "out").num_rows) == (0, 10), done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 10 recordings embedded, 0.00 hours in ")
    assert [line for line in done.stderr.splitlines() if not re.search("file/s|s/file|Set ray log level", line)] == []
    assert json.loads((tmp_path / "out" / "_hear-embed-corpus.json").read_text())["precision"] == "float32"
