"""Packages from the archive: fetched, checked, unpacked, found again; apt and dpkg are stood in for by scripts."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from training import debian

# `apt-cache show` and `apt-get download` from a folder, and a dpkg-deb whose packages are zip archives.
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
def archive(tmp_path, monkeypatch):
    """Offer a package: archive(name, {path: content})."""
    folder = tmp_path / "archive"
    scripts = tmp_path / "bin"
    folder.mkdir()
    scripts.mkdir()
    for name, script in {"apt-cache": APT_CACHE, "apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (scripts / name).write_text(script)
        (scripts / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ARCHIVE", str(folder))

    def offer(name: str, files: dict[str, str]) -> Path:
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


def test_packages_are_unpacked_into_the_cache_once(archive, tmp_path):
    archive("bells", {"usr/share/bell.wav": "ding"})
    archive("gongs", {"usr/share/gong.wav": "bong"})
    folders = debian.fetch(["gongs", "bells"], tmp_path / "cache")
    assert list(folders) == ["gongs", "bells"]
    assert (folders["bells"] / "usr/share/bell.wav").read_text() == "ding"
    assert debian.version("bells", tmp_path / "cache") == "1:2.0-1"
    debian.fetch(["bells", "gongs"], tmp_path / "cache")
    downloads = archive.log.read_text().splitlines()
    assert sorted(line.split()[-1] for line in downloads) == ["bells=1:2.0-1", "gongs=1:2.0-1"]


def test_a_download_of_other_content_is_refused_and_not_kept(archive, tmp_path):
    deb = archive("bells", {"bell.wav": "ding"})
    deb.write_bytes(deb.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"bells 1:2\.0-1 came as .* expected"):
        debian.fetch(["bells"], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name != debian.LOCK_FILE]


def test_what_a_killed_process_left_is_removed_and_the_rest_fetched(archive, tmp_path):
    archive("bells", {"bell.wav": "ding"})
    leftover = tmp_path / "cache" / ".bells-0000.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.deb").write_text("half")
    debian.fetch(["bells"], tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", "bells", "bells.json"]


def test_an_unknown_package_is_named(archive, tmp_path):
    archive("bells", {})
    with pytest.raises(ValueError, match="apt knows no package whistles"):
        debian.fetch(["bells", "whistles"], tmp_path / "cache")
    assert not archive.log.exists()


@pytest.mark.parametrize("name", ["../bells", "Bells", "", "-q", "bells=1"])
def test_only_names_of_packages_are_asked_for(archive, tmp_path, name):
    with pytest.raises(ValueError, match="not the name of a Debian package"):
        debian.fetch([name], tmp_path / "cache")


def test_without_apt_the_cache_still_serves(no_apt, tmp_path):
    (tmp_path / "bells").mkdir()
    assert debian.fetch(["bells"], tmp_path) == {"bells": tmp_path / "bells"}


def test_without_apt_the_error_says_what_is_missing(no_apt, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-cache is not here.*Debian"):
        debian.fetch(["bells"], tmp_path / "cache")


def test_a_failing_tool_is_quoted(archive, tmp_path):
    archive("bells", {}).unlink()
    with pytest.raises(RuntimeError, match=r"apt-get download .* failed with 1: .*bells\.deb"):
        debian.fetch(["bells"], tmp_path / "cache")


def test_a_member_of_a_zip_archive_is_a_file_in_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.pk3", "w") as opened:
        opened.writestr("sound/bell.wav", b"ding")
    path = debian.locate(tmp_path, "data.pk3.d/sound/bell.wav")
    assert path.read_bytes() == b"ding"
    (tmp_path / "data.pk3").unlink()
    assert debian.locate(tmp_path, "data.pk3.d/sound/bell.wav") == path


def test_a_file_is_found_without_the_extension_it_lacks(tmp_path):
    (tmp_path / "death1").write_bytes(b"aargh")
    assert debian.locate(tmp_path, "death1.wav") == tmp_path / "death1"


@pytest.mark.parametrize("path", ["bell.wav", "data.zip.d/bell.wav", "etc/conf.d/bell.wav"])
def test_a_file_that_is_not_there_is_named(tmp_path, path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as opened:
        opened.writestr("gong.wav", b"bong")
    with pytest.raises(FileNotFoundError, match=path):
        debian.locate(tmp_path, path)


@pytest.mark.parametrize("path", ["../bell.wav", "/etc/passwd"])
def test_no_path_leads_out_of_a_package(tmp_path, path):
    with pytest.raises(ValueError, match="not a path inside a package"):
        debian.locate(tmp_path, path)


def test_a_package_may_leave_its_licence_to_another(tmp_path):
    docs = tmp_path / "bells-data" / "usr/share/doc"
    docs.mkdir(parents=True)
    (docs / "bells-data").symlink_to("bells")
    own = tmp_path / "bells" / "usr/share/doc/bells"
    own.mkdir(parents=True)
    (own / "copyright").write_text(
        "Files: *\nLicense: CC-BY-SA-4.0\n text\n\nFiles: a\nLicense: CC0\n\nLicense: CC0\n x"
    )
    text = debian.licence_text("bells-data", tmp_path)
    assert debian.licence_names(text) == ["CC-BY-SA-4.0", "CC0"]


def test_a_package_without_a_licence_is_an_error(tmp_path):
    (tmp_path / "bells").mkdir()
    with pytest.raises(FileNotFoundError, match="copyright"):
        debian.licence_text("bells", tmp_path)
