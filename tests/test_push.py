"""Publishing checkpoints with `hear-weights push` on a stand-in for the Hub on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub_client
import pytest
import torch
from hub_server import TOKEN, HubServer

import hear_axlstm
from hear_encoders import AxLSTMConfig, build_encoder, load_checkpoint, save_checkpoint
from hear_encoders.adapters.folder import write_files

REPO = "org/name"
CARD = "---\nlicense: apache-2.0\n---\n# A small AxLSTM\n\nEmbeds 2 s of sound, in 40 ms steps: größer is not better.\n"


@dataclass(frozen=True)
class Outcome:
    """A command's exit code and output."""

    code: int
    out: str
    err: str


Client = Callable[..., Any]
Push = Callable[..., list[Outcome]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with contextlib.closing(HubServer()) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Call a function of hub_client in a new process that knows only this test's server."""

    def run(
        function: Callable[..., Any], *arguments: Any, home: str = "hf_home", token: str | None = TOKEN, **settings: str
    ) -> Any:
        names = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        settings = {"endpoint": hub.url, **dict.fromkeys(names, "1"), **settings}
        settings |= {} if token is None else {"HF_TOKEN": token}
        return hub_client.call(function, *arguments, home=tmp_path / home, **settings)

    return run


@pytest.fixture
def push(client: Client, tmp_path: Path) -> Push:
    """Run `hear-weights push` with each of the given lists of arguments, one after the other."""

    def run(*commands: list[object], **settings: Any) -> list[Outcome]:
        arguments = [["push", *(str(argument) for argument in command)] for command in commands]
        outcomes = client(hub_client.run_weights, arguments, tmp_path, **settings)
        return [Outcome(**outcome) for outcome in outcomes]

    return run


@pytest.fixture
def push_files(client: Client, tmp_path: Path) -> Client:
    """Call `hub.push_files` with three small files; return its result, or the error's type and message."""
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": CARD.encode()}
    paths = {name: tmp_path / name for name in files}
    for name, path in paths.items():
        path.write_bytes(files[name])
    return lambda repo_id=REPO, private=False, **settings: client(hub_client.push, repo_id, paths, private, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a model card, and a file that must not be published."""
    return make_checkpoint(tmp_path / "weights", seed=1)


def make_checkpoint(folder: Path, seed: int) -> Path:
    save_checkpoint(folder, build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1), seed=seed).eval())
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "optimizer.pt").write_bytes(b"not to be published")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What is to be published of a folder: weights and card, and what `write_files` adds."""
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "README.md")}
    with tempfile.TemporaryDirectory() as scratch:
        added = write_files(scratch, load_checkpoint(folder).config)
        return files | {name: (Path(scratch) / name).read_bytes() for name in added}


def embeddings(folder: Path) -> list[list[float]]:
    model = hear_axlstm.load_model(folder)
    return hear_axlstm.get_scene_embeddings(torch.linspace(-1, 1, 16000)[None], model).tolist()


def assert_refused(outcome: dict[str, str], error: str, *parts: str) -> None:
    assert outcome.get("error") == error, outcome
    for part in parts:
        assert part in outcome["message"]
    assert "\n" not in outcome["message"]


def test_pushed_checkpoint_loads_from_the_hub_as_from_its_folder(hub, client, push, folder) -> None:
    (outcome,) = push([folder, REPO, "--yes", "--message", "first weights"])
    assert outcome.code == 0, outcome.err
    assert not hub.is_private(REPO)
    _empty, (commit, message, files) = hub.history(REPO)  # the Hub creates a repository with a first commit
    assert files.keys() - contents(folder).keys() == {".gitattributes"}
    assert files.items() >= contents(folder).items()
    own = json.loads((folder / "config.json").read_text())
    assert json.loads(files["config.json"]).items() > own.items()  # with transformers' fields
    assert message == "first weights"
    assert f"{hub.url}/{REPO}/commit/{commit}" in outcome.out
    assert re.search(rf"^commit +{commit}$", outcome.out, re.MULTILINE)
    assert client(hub_client.embed, REPO, token=None) == embeddings(folder)


def test_weights_go_to_storage_without_the_token(hub, push_files) -> None:
    assert "result" in push_files()
    (upload,) = [request for request in hub.requests if request.storage]
    assert (upload.method, upload.body) == ("PUT", b"weights")
    assert "authorization" not in upload.headers
    (commit,) = [request for request in hub.requests if "/commit/" in request.path]
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["key"] for line in lines] == ["header", "file", "lfsFile", "file"]


def test_second_push_makes_a_second_commit_and_keeps_other_files(hub, client, push, folder, tmp_path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=2)
    hub.commit(REPO, {"figure.png": b"png"})
    first, second, again = push(*([path, REPO, "--yes"] for path in (folder, other, other)))
    assert [outcome.code for outcome in (first, second, again)] == [0, 0, 0], (first.err, second.err, again.err)
    _before, (old, _message, old_files), (new, _message, new_files) = hub.history(REPO)
    assert old_files == {"figure.png": b"png", **contents(folder)}
    assert new_files == {"figure.png": b"png", **contents(other)}
    assert old in first.out and new in second.out
    assert new in again.out  # unchanged: no commit is made, the earlier one is named
    assert client(hub_client.embed, REPO, home="fresh") == embeddings(other) != embeddings(folder)


def test_dry_run_shows_everything_and_makes_no_request(hub, push, folder, tmp_path) -> None:
    card = tmp_path / "MODEL CARD.md"
    card.write_text("# Another card\n")
    plain, other, real = push(
        [folder, REPO], [folder, REPO, "--private", "--card", card], [folder, REPO, "--yes"], token=None
    )
    assert hub.requests == [] and hub.history(REPO) == []
    assert real.code == 2  # there is no token; the dry runs need none
    assert real.err.startswith("hear-weights: error: there is no token")
    assert (plain.code, plain.err, other.code, other.err) == (0, "", 0, "")
    assert REPO in plain.out and "private" not in plain.out
    assert f"\n{CARD}" in plain.out
    for name, body in contents(folder).items():
        (line,) = [line for line in plain.out.splitlines() if line.startswith(f"{name} ")]
        assert hashlib.sha256(body).hexdigest() in line
        assert f" {len(body):,} bytes" in line
    assert "optimizer.pt" not in plain.out
    assert plain.out.splitlines()[-1] == f"hear-weights push --yes {folder} {REPO}"
    assert "private" in other.out
    assert "# Another card" in other.out and "# A small AxLSTM" not in other.out
    assert other.out.splitlines()[-1] == f"hear-weights push --yes {folder} {REPO} --private --card '{card}'"


def test_card_from_another_path_becomes_the_readme_of_a_private_repository(hub, push, folder, tmp_path) -> None:
    card = tmp_path / "MODEL_CARD.md"
    (folder / "README.md").rename(card)
    (outcome,) = push([folder, REPO, "--yes", "--private", "--card", card])
    assert outcome.code == 0, outcome.err
    assert hub.is_private(REPO)
    files = hub.history(REPO)[-1][2]
    assert files["README.md"] == CARD.encode()
    assert "MODEL_CARD.md" not in files


def test_invalid_checkpoints_cards_and_names_are_refused_before_any_request(hub, push, folder, tmp_path) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / name)

    (copy("truncated") / "model.safetensors").write_bytes(b"")
    (copy("foreign") / "config.json").write_text('{"family": "resnet"}')
    (copy("cardless") / "README.md").unlink()
    (copy("blank") / "README.md").write_text(" \n")
    (copy("binary") / "README.md").write_bytes(b"\xff\xfe")
    cases = {
        ("truncated", REPO): "model.safetensors",
        ("foreign", REPO): "config.json",
        ("cardless", REPO): "--card PATH",
        ("blank", REPO): "README.md: the model card is empty",
        ("binary", REPO): "UTF-8",
        ("nowhere", REPO): "nowhere: expected a directory",
        ("weights/model.safetensors", REPO): "expected a directory",
        ("weights", REPO, "--card", "nothere.md"): "nothere.md",
        ("weights", "name"): "'org/name'",
        ("weights", "org/name/more"): "'org/name'",
        ("weights", "org/na--me"): "'org/na--me'",
        ("weights", REPO, "--message", ""): "--message",
    }
    outcomes = push(*([*case, "--yes"] for case in cases))
    for (case, complaint), outcome in zip(cases.items(), outcomes):
        assert outcome.code == 2, case
        assert outcome.out == ""
        assert complaint in outcome.err, case
        assert outcome.err.splitlines()[-1].startswith("hear-weights"), case
    assert hub.requests == []


def test_without_a_token_nothing_is_uploaded(hub, push_files) -> None:
    assert_refused(push_files(token=None), "PermissionError", "no token", f"'{REPO}'", "HF_TOKEN", "hf auth login")
    assert hub.requests == []


def test_token_is_sent_though_implicit_tokens_are_disabled(hub, push_files) -> None:
    assert "result" in push_files(HF_HUB_DISABLE_IMPLICIT_TOKEN="1")


def test_token_without_write_access(hub, push_files) -> None:
    assert_refused(push_files(token="hf_wrong"), "PermissionError", f"'{REPO}'", "401", "HF_TOKEN", "hf auth login")
    hub.fail("create", 403)  # as for a foreign organization
    assert_refused(push_files(), "PermissionError", f"'{REPO}'", "403", "HF_TOKEN", "hf auth login")
    assert hub.history(REPO) == []


def test_public_repository_is_not_pushed_to_as_private(hub, push_files) -> None:
    hub.commit(REPO, {})
    assert_refused(push_files(private=True), "PermissionError", f"'{REPO}'", "public", "nothing was uploaded")
    assert len(hub.history(REPO)) == 1
    assert not any(request.storage for request in hub.requests)
    hub.commit(REPO, {}, private=True)
    assert "result" in push_files(private=True)


@pytest.mark.parametrize(("what", "name", "method"), [("the look", "main", "POST"), ("the weights", "upload", "PUT")])
def test_server_error_leaves_no_commit(hub, push_files, what: str, name: str, method: str) -> None:
    hub.fail(name, 503, method=method)
    assert_refused(push_files(), "ConnectionError", f"'{REPO}'", "503")
    assert len(hub.history(REPO)) == 1
    hub.mend()
    url, commit = push_files()["result"]
    assert commit == hub.history(REPO)[-1][0] and url.endswith(commit)


def test_card_metadata_that_the_hub_rejects(hub, push_files) -> None:
    hub.card_errors = ['"license" must be one of a list']
    outcome = push_files()
    assert outcome["error"] == "ValueError"
    assert "README.md" in outcome["message"] and hub.card_errors[0] in outcome["message"]
    assert len(hub.history(REPO)) == 1
    assert not any(request.storage for request in hub.requests)


def test_unreachable_hub(hub, push_files) -> None:
    assert_refused(push_files(HF_HUB_OFFLINE="1"), "ConnectionError", f"'{REPO}'", "offline", "HF_HUB_OFFLINE")
    assert hub.requests == []
    hub.fail("create", 200)  # such as a network's login page
    assert_refused(push_files(), "ConnectionError", hub.url, "HF_ENDPOINT")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert_refused(push_files(endpoint=closed), "ConnectionError", f"'{REPO}'", closed)
