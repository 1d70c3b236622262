"""Debian packages and the corpus made of them. Scripts stand in for apt and dpkg."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from evaluation.open_tasks.sources import read_list
from hear_encoders import console
from hear_encoders.files import LOCK_FILE
from training.corpora import archive, debian
from training.corpora.shards import ShardIndex

# `apt-cache show` and `apt-get download` read a folder; for this dpkg-deb, packages are zip archives.
APT_CACHE = """#!/bin/sh
shift 2
for name in "$@"; do cat "$ARCHIVE/$name.stanza" 2>/dev/null; echo; done
exit 100
"""
APT_GET = """#!/bin/sh
echo "$@" >> "$ARCHIVE/log"
for last in "$@"; do :; done
cp "$ARCHIVE/${last%%=*}.deb" .
"""
DPKG_DEB = """#!/bin/sh
mkdir "$3" && cd "$3" && python3 -m zipfile -e "$2" .
"""


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Return offer(name, {path: content}), which adds a package to the stand-in archive."""
    if os.name == "nt":
        pytest.skip("the stand-ins are shell scripts")
    folder = tmp_path / "archive"
    scripts = tmp_path / "bin"
    folder.mkdir()
    scripts.mkdir()
    for name, script in {"apt-cache": APT_CACHE, "apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (scripts / name).write_text(script)
        (scripts / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ARCHIVE", str(folder))

    def offer(name: str, files: dict[str, str | bytes]) -> Path:
        deb = folder / f"{name}.deb"
        with zipfile.ZipFile(deb, "w") as opened:
            for path, content in files.items():
                opened.writestr(path, content)
        data = deb.read_bytes()
        (folder / f"{name}.stanza").write_text(
            f"Package: {name}\nVersion: 1:2.0-1\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription: sounds\n Package: not this\n"
        )
        return deb

    offer.log = folder / "log"
    return offer


@pytest.fixture
def no_apt(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_packages_are_unpacked_into_the_cache_once(offer, tmp_path):
    offer("bells", {"usr/share/bell.wav": "ding"})
    offer("gongs", {"usr/share/gong.wav": "bong"})
    folders = archive.fetch(["gongs", "bells"], tmp_path / "cache")
    assert list(folders) == ["gongs", "bells"]
    assert (folders["bells"] / "usr/share/bell.wav").read_text() == "ding"
    assert archive.version("bells", tmp_path / "cache") == "1:2.0-1"
    archive.fetch(["bells", "gongs"], tmp_path / "cache")
    downloads = offer.log.read_text().splitlines()
    assert sorted(line.split()[-1] for line in downloads) == ["bells=1:2.0-1", "gongs=1:2.0-1"]


def test_a_corrupt_download_is_refused_and_not_kept(offer, tmp_path):
    deb = offer("bells", {"bell.wav": "ding"})
    deb.write_bytes(deb.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"bells 1:2\.0-1 has .* expected"):
        archive.fetch(["bells"], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name != LOCK_FILE]


def test_leftovers_of_a_killed_process_are_removed(offer, tmp_path):
    offer("bells", {"bell.wav": "ding"})
    leftover = tmp_path / "cache" / ".bells-0000.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.deb").write_text("half")
    archive.fetch(["bells"], tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", "bells", "bells.json"]


def test_an_unknown_package_is_named(offer, tmp_path):
    offer("bells", {})
    with pytest.raises(ValueError, match="apt does not know whistles"):
        archive.fetch(["bells", "whistles"], tmp_path / "cache")
    assert not offer.log.exists()


@pytest.mark.parametrize("name", ["../bells", "Bells", "", "-q", "bells=1"])
def test_anything_but_a_package_name_is_refused(offer, tmp_path, name):
    with pytest.raises(ValueError, match="not a Debian package name"):
        archive.fetch([name], tmp_path / "cache")


def test_cached_packages_need_no_apt(no_apt, tmp_path):
    (tmp_path / "bells").mkdir()
    assert archive.fetch(["bells"], tmp_path) == {"bells": tmp_path / "bells"}


def test_without_apt_the_error_names_it(no_apt, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-cache not found.*Debian"):
        archive.fetch(["bells"], tmp_path / "cache")


def test_a_failing_tool_is_quoted(offer, tmp_path):
    offer("bells", {}).unlink()
    with pytest.raises(RuntimeError, match=r"apt-get download .* failed with exit code 1: .*bells\.deb"):
        archive.fetch(["bells"], tmp_path / "cache")


def test_a_member_of_a_zip_archive_is_a_file_in_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.pk3", "w") as opened:
        opened.writestr("sound/bell.wav", b"ding")
    path = archive.locate(tmp_path, "data.pk3.d/sound/bell.wav")
    assert path.read_bytes() == b"ding"
    (tmp_path / "data.pk3").unlink()
    assert archive.locate(tmp_path, "data.pk3.d/sound/bell.wav") == path


def test_a_file_is_found_without_the_extension_it_lacks(tmp_path):
    (tmp_path / "death1").write_bytes(b"aargh")
    assert archive.locate(tmp_path, "death1.wav") == tmp_path / "death1"


@pytest.mark.parametrize("path", ["bell.wav", "data.zip.d/bell.wav", "etc/conf.d/bell.wav"])
def test_a_missing_file_is_named(tmp_path, path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as opened:
        opened.writestr("gong.wav", b"bong")
    with pytest.raises(FileNotFoundError, match=path):
        archive.locate(tmp_path, path)


@pytest.mark.parametrize("path", ["../bell.wav", "/etc/passwd"])
def test_no_path_leads_out_of_a_package(tmp_path, path):
    with pytest.raises(ValueError, match="not a path inside a package"):
        archive.locate(tmp_path, path)


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
@pytest.mark.parametrize("path", ["link/bell.wav", "bell.wav", "link/data.zip.d/bell.wav", "data.zip.d/bell.wav"])
def test_no_link_leads_out_of_a_package(tmp_path, path):
    package, outside = tmp_path / "package", tmp_path / "outside"
    package.mkdir()
    outside.mkdir()
    (outside / "bell.wav").write_bytes(b"ding")
    with zipfile.ZipFile(outside / "data.zip", "w") as opened:
        opened.writestr("bell.wav", b"ding")
    (package / "link").symlink_to(outside)
    (package / "bell.wav").symlink_to("../outside/bell.wav")
    (package / "data.zip").symlink_to(outside / "data.zip")
    with pytest.raises(ValueError, match=r"a link leads out of package package: (link|bell|data)"):
        archive.locate(package, path)
    assert sorted(os.listdir(outside)) == ["bell.wav", "data.zip"]  # nothing was unpacked there


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_links_within_a_package_are_followed(tmp_path):
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "bell.wav").write_bytes(b"ding")
    (tmp_path / "link").symlink_to("sounds")
    (tmp_path / "bell").symlink_to("link/bell.wav")
    assert archive.locate(tmp_path, "link/bell.wav").read_bytes() == b"ding"
    assert archive.locate(tmp_path, "bell.wav").read_bytes() == b"ding"  # named without the extension it lacks


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_a_licence_may_be_a_link_into_another_package(tmp_path):
    docs = tmp_path / "bells-data" / "usr/share/doc"
    docs.mkdir(parents=True)
    (docs / "bells-data").symlink_to("bells")
    own = tmp_path / "bells" / "usr/share/doc/bells"
    own.mkdir(parents=True)
    (own / "copyright").write_text(
        "Files: *\nLicense: CC-BY-SA-4.0\n text\n\nFiles: a\nLicense: CC0\n\nLicense: CC0\n x"
    )
    text = archive.licence_text("bells-data", tmp_path)
    assert archive.licence_names(text) == ["CC-BY-SA-4.0", "CC0"]


def test_a_package_without_a_licence_is_an_error(tmp_path):
    (tmp_path / "bells").mkdir()
    with pytest.raises(FileNotFoundError, match="copyright"):
        archive.licence_text("bells", tmp_path)


# ---- the corpus ----


def test_the_corpus_is_56_hours_of_music_speech_and_sounds():
    hours = dict.fromkeys(debian.KINDS, 0.0)
    for entry in debian.read_manifest():
        hours[entry.kind] += entry.seconds / 3600
    assert {kind: round(value, 1) for kind, value in hours.items()} == {"music": 45.5, "speech": 8.4, "sounds": 2.3}


def test_no_test_clip_of_a_task_is_in_the_corpus():
    corpus = {entry.recording for entry in debian.read_manifest()}
    assert corpus.isdisjoint(entry.recording for entry in debian.read_manifest(roles=["evaluation"]))
    lists = Path(debian.__file__).parents[2] / "evaluation" / "open_tasks" / "lists"
    checked = 0
    for name in ("drum_stroke", "everyday_sounds", "spoken_words", "language_id", "speaker_count"):
        for row in read_list(name):
            if row["split"] == "test" or "fold" in row["split"] or name == "spoken_words":
                assert row["path"] not in corpus, (name, row["path"])
                checked += 1
    assert checked > 3000 and lists.is_dir()


def noise(seconds: float, rate: int = 16000) -> bytes:
    """Return a WAV file of white noise."""
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


@pytest.fixture
def small_corpus(offer, tmp_path, monkeypatch):
    """Offer two packages and list some of their files; return the folder for the corpus."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as opened:
        opened.writestr("sound/beep.wav", noise(1))
    doc = "usr/share/doc/{}/copyright"
    offer(
        "toys",
        {
            "usr/tune.wav": noise(25, 22050),
            "usr/unlisted.wav": noise(5),
            "usr/tested.wav": noise(5),
            "usr/data.pk3": data.getvalue(),
            doc.format("toys"): "License: GPL-2+",
        },
    )
    offer("talk", {"usr/word.wav": noise(2), "usr/broken.wav": "not audio", doc.format("talk"): "License: CC0"})
    rows = [
        "package,path,seconds,kind,language,role",
        "talk,usr/broken.wav,1,speech,en,both",
        "talk,usr/word.wav,2,speech,en,both",
        "toys,usr/data.pk3.d/sound/beep.wav,1,sound effects,,pretraining",
        "toys,usr/tested.wav,5,music,,evaluation",
        "toys,usr/tune.wav,25,music,,pretraining",
    ]
    manifest = tmp_path / "list.csv.gz"
    manifest.write_bytes(gzip.compress("\n".join(rows).encode()))
    monkeypatch.setattr(debian, "MANIFEST", manifest)
    return tmp_path / "corpus"


def test_the_shards_hold_exactly_the_listed_recordings(small_corpus, tmp_path, capsys):
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    assert debian.main(arguments) == debian.FAILED  # one file is not audio
    assert "failed: talk/usr/broken.wav" in capsys.readouterr().err
    sources = {}
    for kind in debian.KINDS:
        index = ShardIndex.open(small_corpus / "shards" / kind)
        records = [index.record(i) for i in range(len(index))]
        sources[kind] = {record.source.removeprefix("recordings/") for record in records}
        listed = [e for e in debian.read_manifest() if e.kind == kind and "broken" not in e.path]
        assert sum(record.duration_s for record in records) == pytest.approx(sum(e.seconds for e in listed), abs=0.1)
    assert sources == {
        "music": {"toys/usr/tune.wav"},
        "speech": {"talk/usr/word.wav"},
        "sounds": {"toys/usr/data.pk3.d/sound/beep.wav"},
    }
    licences = (small_corpus / "LICENCES.md").read_text()
    assert "| talk | 1:2.0-1 | 0.00 | CC0 |" in licences and "| toys | 1:2.0-1 | 0.01 | GPL-2+ |" in licences


def test_building_again_makes_only_the_missing_shards(small_corpus, tmp_path, offer, capsys):
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    debian.main(arguments)
    before = (small_corpus / "shards/music/shard-000000.tar").stat().st_mtime_ns
    shutil.rmtree(small_corpus / "shards/speech")
    debian.main(arguments)
    assert len(ShardIndex.open(small_corpus / "shards/speech")) == 1
    assert (small_corpus / "shards/music/shard-000000.tar").stat().st_mtime_ns == before
    assert len(offer.log.read_text().splitlines()) == 2  # nothing was downloaded twice


def test_packages_can_be_skipped(small_corpus, tmp_path, capsys):
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1", "--skip"]
    assert debian.main([*arguments, "talk"]) == 0
    assert not (small_corpus / "shards/speech").exists() and not (tmp_path / "cache/talk").exists()
    assert debian.main([*arguments, "tolk"]) == debian.BAD_USAGE
    assert "not in the corpus: tolk" in capsys.readouterr().err


def test_packages_in_the_corpus_cannot_be_skipped(small_corpus, tmp_path, capsys):
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    debian.main(arguments)
    licences = (small_corpus / "LICENCES.md").read_text()
    assert debian.main([*arguments, "--skip", "talk"]) == debian.BAD_USAGE
    assert "already holds talk" in capsys.readouterr().err
    assert (small_corpus / "LICENCES.md").read_text() == licences


def test_skipped_packages_cannot_be_added(small_corpus, tmp_path, monkeypatch, offer, capsys):
    monkeypatch.setattr(debian, "HELD_OUT", ("talk", "toys"))  # in one part
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    assert debian.main([*arguments, "--skip", "talk"]) == 0
    before = (small_corpus / "LICENCES.md").read_text()
    assert debian.main(arguments) == debian.BAD_USAGE
    assert "was begun without talk: repeat --skip" in capsys.readouterr().err
    assert (small_corpus / "LICENCES.md").read_text() == before
    assert debian.main([*arguments, "--skip", "talk"]) == 0  # nothing was damaged
    assert not (tmp_path / "cache/talk").exists()


def test_after_a_disk_error_no_recording_is_missing(small_corpus, tmp_path, monkeypatch, capsys):
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    with monkeypatch.context() as failing:

        def locate(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        failing.setattr(debian.archive, "locate", locate)
        assert debian.main(arguments) == debian.BAD_USAGE
    assert os.strerror(errno.EIO) in capsys.readouterr().err
    assert not (small_corpus / "shards").exists()
    debian.main(arguments)
    assert len(ShardIndex.open(small_corpus / "shards/speech")) == 1


def test_an_interruption_ends_the_build(small_corpus, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(debian.prepare, "main", lambda arguments: parts.append(arguments[0]) or debian.INTERRUPTED)
    outcome = debian.main([str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"])
    assert outcome == debian.INTERRUPTED and len(parts) == 1


def test_sigterm_ends_the_build_and_its_child_processes(small_corpus, tmp_path, capsys):
    pid_file = tmp_path / "pid"
    script = f"#!/bin/sh\necho $$ > {pid_file}\nkill -TERM $PPID\nexec sleep 60\n"
    (tmp_path / "bin/dpkg-deb").write_text(script)
    arguments = [str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
    start_s = time.monotonic()
    assert debian.main(arguments) == debian.INTERRUPTED
    assert time.monotonic() - start_s < 30
    assert not psutil.pid_exists(int(pid_file.read_text()))
    assert "run the same command again" in capsys.readouterr().err


def test_progress_is_printed_line_by_line_to_a_file(monkeypatch, capsys):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0)
    with console.progress(4, "shard", "shards", done=1) as advance:
        advance()
        advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == ["shards:  50% 2/4", "shards: 100% 4/4"]


def test_without_apt_the_build_says_so(small_corpus, tmp_path, no_apt, capsys):
    assert debian.main([str(small_corpus), "--cache", str(tmp_path / "cache")]) == debian.BAD_USAGE
    assert "fetching them takes apt" in capsys.readouterr().err


def test_held_out_packages_get_their_own_shards(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(debian, "HELD_OUT", ("toys",))
    debian.main([str(small_corpus), "--cache", str(tmp_path / "cache"), "--jobs", "1"])
    index = ShardIndex.open(small_corpus / "shards/held_out")
    assert {index.record(i).source.partition("/")[0] for i in range(len(index))} == {"toys"}
    assert not (small_corpus / "shards/music").exists() and not (small_corpus / "shards/sounds").exists()


def test_held_out_packages_are_in_the_corpus_and_cover_all_kinds():
    held_out = [entry for entry in debian.read_manifest() if entry.part == "held_out"]
    assert {entry.package for entry in held_out} == set(debian.HELD_OUT)
    assert {entry.kind for entry in held_out} == set(debian.KINDS)
    assert 1 < sum(entry.seconds for entry in held_out) / 3600 < 2
