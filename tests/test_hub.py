"""Fetching checkpoints from a stand-in for the Hub on loopback; nothing here leaves the machine."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hub_client
import pytest
from hub_server import TOKEN, HubServer, Request

from hear_encoders.hub import cached_sha256

REPO = "org/name"
CONFIG = b'{"family": "audiomaepp"}'
WEIGHTS = bytes(range(256)) * 400
LONG_WEIGHTS = bytes(range(256)) * (24 << 12)  # 24 MiB: the client writes in steps of 10 MiB
CUT = 15 << 20
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


@dataclass(frozen=True)
class Outcome:
    """Result of a fetch_checkpoint call: the path, or the error's type, its message and its cause's type."""

    result: Path | None = None
    error: str | None = None
    message: str = ""
    cause: str = ""


Fetch = Callable[..., Outcome]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with contextlib.closing(HubServer()) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf_home"


@pytest.fixture
def fetch(hub: HubServer, home: Path) -> Fetch:
    """Call fetch_checkpoint in a new process that knows only this test's server and cache."""

    def run(repo_id: str = REPO, revision: str | None = None, **settings: str) -> Outcome:
        settings = {"endpoint": hub.url, **settings}
        return Outcome(**hub_client.call(hub_client.fetch, repo_id, revision, home=home, **settings))

    return run


@pytest.fixture
def closed_url() -> str:
    """Return a URL on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def assert_fetched(outcome: Outcome, commit: str, files: dict[str, bytes] = FILES) -> None:
    assert outcome.error is None, f"{outcome.error}: {outcome.message}"
    assert outcome.result.name == commit
    assert {file.name: file.read_bytes() for file in outcome.result.iterdir()} == files


def assert_refused(outcome: Outcome, error: str, *parts: str) -> None:
    """Assert that the error is exactly this built-in, its message has all `parts`, and it is chained to its cause."""
    assert outcome.error == error, f"{outcome.error}: {outcome.message}"
    for part in parts:
        assert part in outcome.message
    assert outcome.cause not in ("", "NoneType")


def files_in_snapshots(home: Path, name: str) -> list[Path]:
    return list(home.glob(f"hub/*/snapshots/*/{name}"))


def file_requests(hub: HubServer) -> list[tuple[str, str]]:
    """Return the requests for files as (method, file name); those to the storage server have "GET storage".

    Leave out the requests for telemetry that newer clients make before a download.
    """
    return [
        (request.method + " storage" * request.storage, request.path.partition("?")[0].rpartition("/")[2])
        for request in hub.requests
        if not request.path.startswith("/api/")
    ]


def test_downloads_both_files_and_follows_the_redirect_to_storage(hub: HubServer, fetch: Fetch, home: Path) -> None:
    commit = hub.commit(REPO, FILES)
    outcome = fetch()
    assert_fetched(outcome, commit)
    assert outcome.result.is_relative_to(home)
    assert cached_sha256(outcome.result / "model.safetensors") == hashlib.sha256(WEIGHTS).hexdigest()
    assert cached_sha256(outcome.result / "config.json") is None
    assert file_requests(hub) == [
        ("HEAD", "config.json"),
        ("GET", "config.json"),
        ("HEAD", "model.safetensors"),
        ("GET storage", "model.safetensors"),
    ]


def test_second_fetch_makes_no_request(hub: HubServer, fetch: Fetch) -> None:
    commit = hub.commit(REPO, FILES)
    first = fetch()
    hub.requests.clear()
    hub.commit(REPO, {**FILES, "config.json": b"{}"})  # moves the branch, which is not looked up
    second = fetch()
    assert_fetched(second, commit)
    assert second.result == first.result
    assert hub.requests == []


def test_revision_is_a_branch_a_commit_or_a_pull_request(hub: HubServer, fetch: Fetch) -> None:
    old_files = {**FILES, "model.safetensors": WEIGHTS[::-1]}
    old = hub.commit(REPO, old_files)
    new = hub.commit(REPO, FILES)
    side = hub.commit(REPO, {**FILES, "config.json": b"{}"}, branch="refs/pr/1")
    assert_fetched(fetch(revision=old), old, old_files)
    assert_fetched(fetch(revision="main"), new)
    assert_fetched(fetch(revision="refs/pr/1"), side, {**FILES, "config.json": b"{}"})
    hub.requests.clear()
    for revision, commit in ((old, old), ("main", new), (None, new), ("refs/pr/1", side)):
        assert fetch(revision=revision).result.name == commit
    assert hub.requests == []


def test_weights_come_from_the_same_commit_as_the_config_if_the_branch_moves(hub: HubServer, fetch: Fetch) -> None:
    old = hub.commit(REPO, FILES)

    def move_branch(request: Request) -> None:
        if request.path.endswith("/model.safetensors"):
            hub.before_answer = None
            hub.commit(REPO, {"config.json": b"{}", "model.safetensors": WEIGHTS[::-1]})

    hub.before_answer = move_branch
    assert_fetched(fetch(), old)
    assert f"/{REPO}/resolve/{old}/model.safetensors" in [request.path for request in hub.requests]


def test_a_cached_config_is_not_combined_with_weights_of_another_commit(hub: HubServer, fetch: Fetch) -> None:
    hub.commit(REPO, {"config.json": CONFIG})
    assert_refused(fetch(), "FileNotFoundError", "model.safetensors")
    new_files = {"config.json": b"{}", "model.safetensors": WEIGHTS[::-1]}
    new = hub.commit(REPO, new_files)  # the author adds the weights
    assert_fetched(fetch(), new, new_files)


def test_a_file_of_another_commit_is_refused(hub: HubServer, fetch: Fetch) -> None:
    commit = hub.commit(REPO, FILES)

    def misreport(request: Request) -> None:
        hub.misreported_commit = "0" * 40 if "model.safetensors" in request.path else None

    hub.before_answer = misreport
    outcome = fetch()
    assert outcome.error == "ConnectionError"
    assert commit in outcome.message and "0" * 40 in outcome.message and REPO in outcome.message


def test_unknown_repository(hub: HubServer, fetch: Fetch) -> None:
    assert_refused(
        fetch("org/typo", HF_TOKEN=TOKEN), "FileNotFoundError", "'org/typo'", "no such repository", "no such local path"
    )
    # Without a token the Hub answers 401 for missing repositories, as it does for private ones.
    assert_refused(fetch("org/typo"), "PermissionError", "'org/typo'", "may not exist", "no such local path")
    hub.fail("config.json", 404)  # as a mirror may answer, without the Hub's error code
    assert_refused(fetch("org/typo"), "FileNotFoundError", "'org/typo'", "no such repository or file")


def test_unknown_revision(hub: HubServer, fetch: Fetch) -> None:
    hub.commit(REPO, FILES)
    assert_refused(fetch(revision="v9"), "FileNotFoundError", f"'{REPO}'", "revision 'v9'", "no such revision")
    assert_refused(fetch(revision="0" * 40), "FileNotFoundError", "0" * 40, "no such revision")


def test_missing_file(hub: HubServer, fetch: Fetch) -> None:
    commit = hub.commit(REPO, {"config.json": CONFIG})
    hub.commit(REPO, {"model.safetensors": WEIGHTS}, branch="bare")
    assert_refused(
        fetch(revision="main"),
        "FileNotFoundError",
        "no such file",
        "fetch model.safetensors of",
        f"'{REPO}'",
        "'main'",
        commit,
    )
    assert_refused(fetch(revision="bare"), "FileNotFoundError", "no such file", "fetch config.json of", "'bare'")


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "../name", "org/na me", "./checkpoint", "org/name.git"])
def test_malformed_repository_name(hub: HubServer, fetch: Fetch, repo_id: str) -> None:
    assert_refused(fetch(repo_id), "ValueError", repr(repo_id), "org/name", "local path")
    assert hub.requests == []


def test_private_repository_needs_the_token(hub: HubServer, fetch: Fetch) -> None:
    commit = hub.commit(REPO, FILES, private=True)
    assert_refused(fetch(), "PermissionError", f"'{REPO}'", "401", "HF_TOKEN", "hf auth login")
    assert_refused(fetch(HF_TOKEN="hf_wrong"), "PermissionError", f"'{REPO}'", "401", "HF_TOKEN")
    hub.requests.clear()
    assert_fetched(fetch(HF_TOKEN=TOKEN), commit)
    # The token is for the Hub; the storage server, on another host, must not see it.
    assert {request.headers.get("authorization") for request in hub.requests if request.storage} == {None}


def test_gated_repository(hub: HubServer, fetch: Fetch) -> None:
    hub.commit(REPO, FILES, gated=True)
    for settings, status in (({}, "401"), ({"HF_TOKEN": TOKEN}, "403")):
        outcome = fetch(**settings)
        assert_refused(outcome, "PermissionError", "gated", status, f"{hub.url}/{REPO}", "HF_TOKEN", "hf auth login")


def test_server_error(hub: HubServer, fetch: Fetch) -> None:
    commit = hub.commit(REPO, FILES)
    hub.fail("config.json", 500)
    assert_refused(fetch(), "ConnectionError", "500", "config.json", f"'{REPO}'", "default branch", "again")
    hub.mend()
    hub.fail("model.safetensors", 503, method="GET")  # the look-up succeeds, the storage server fails
    assert_refused(fetch(), "ConnectionError", "503", "model.safetensors", f"'{REPO}'", commit)
    hub.mend()
    assert_fetched(fetch(), commit)


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("announced", [True, False], ids=["connection closed early", "shorter than the look-up said"])
def test_truncated_body_is_never_loadable(
    hub: HubServer, fetch: Fetch, home: Path, filename: str, announced: bool
) -> None:
    commit = hub.commit(REPO, FILES)
    hub.cut(filename, at=10, announced=announced)
    assert_refused(fetch(), "ConnectionError", filename, f"'{REPO}'", "again")
    assert files_in_snapshots(home, filename) == []
    assert_refused(fetch(HF_HUB_OFFLINE="1"), "FileNotFoundError", filename, "offline")
    hub.mend()
    assert_fetched(fetch(), commit)


def test_body_cut_once_is_completed(hub: HubServer, fetch: Fetch) -> None:
    files = {**FILES, "model.safetensors": LONG_WEIGHTS}
    commit = hub.commit(REPO, files)
    hub.cut("model.safetensors", at=CUT, times=1)
    first = fetch()
    if first.error is not None:  # huggingface_hub 0.x resumes in the next call, later versions at once
        assert_refused(first, "ConnectionError", "model.safetensors")
        first = fetch()
    assert_fetched(first, commit, files)
    ranges = [request.headers["range"] for request in hub.requests if "range" in request.headers]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").removesuffix("-")) <= CUT


def test_server_that_answers_a_range_request_with_the_whole_file(hub: HubServer, fetch: Fetch, home: Path) -> None:
    files = {**FILES, "model.safetensors": LONG_WEIGHTS}
    commit = hub.commit(REPO, files)
    hub.supports_ranges = False
    hub.cut("model.safetensors", at=CUT, times=1)
    for _ in range(3):
        outcome = fetch()
        if outcome.error is not None:
            assert_refused(outcome, "ConnectionError", "model.safetensors")
            assert files_in_snapshots(home, "model.safetensors") == []
    if outcome.error is not None:  # huggingface_hub 0.30 to 1.0 appends the file to its part and never recovers
        partial = home / "hub" / "models--org--name" / "blobs" / "*.incomplete"
        assert f"delete {partial}" in outcome.message
        hub.supports_ranges = True  # the partial file is too long: HTTP 416
        assert_refused(fetch(), "ConnectionError", "model.safetensors", "416", f"delete {partial}")
        for file in partial.parent.glob(partial.name):
            file.unlink()
        outcome = fetch()
    assert_fetched(outcome, commit, files)


def test_offline_mode_reads_only_the_cache(hub: HubServer, fetch: Fetch, home: Path) -> None:
    commit = hub.commit(REPO, FILES)
    for revision in (None, commit):
        assert_refused(
            fetch(revision=revision, HF_HUB_OFFLINE="1"),
            "FileNotFoundError",
            "config.json",
            f"'{REPO}'",
            revision or "default branch",
            "not in the cache",
            "offline mode is on",
            "HF_HUB_OFFLINE",
        )
    assert hub.requests == []
    fetch()
    hub.requests.clear()
    assert_fetched(fetch(HF_HUB_OFFLINE="1"), commit)
    assert hub.requests == []


def test_unreachable_hub(hub: HubServer, fetch: Fetch, closed_url: str) -> None:
    commit = hub.commit(REPO, FILES)
    assert_refused(
        fetch(endpoint=closed_url),
        "FileNotFoundError",
        "config.json",
        f"'{REPO}'",
        "not in the cache",
        "could not be reached",
        closed_url,
    )
    fetch()
    assert_fetched(fetch(endpoint=closed_url), commit)


def test_login_page_instead_of_the_hub(hub: HubServer, fetch: Fetch) -> None:
    hub.commit(REPO, FILES)
    hub.fail("config.json", 200)
    assert_refused(fetch(), "ConnectionError", "config.json", f"'{REPO}'", hub.url, "HF_ENDPOINT")


def test_cache_that_cannot_be_written(hub: HubServer, fetch: Fetch, home: Path) -> None:
    hub.commit(REPO, FILES)
    home.write_text("a file where the directory should be")
    outcome = fetch()
    assert outcome.error in ("NotADirectoryError", "FileExistsError")
    assert str(home) in outcome.message
