"""Publishing checkpoints with `hear-weights push`, against a stand-in for the Hub on loopback.

huggingface_hub reads its settings from the environment when it is imported, so each client is a process of its own.
What needs no command gets only hub.py, as in test_hub.py: importing torch takes longer than the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("huggingface_hub")

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import TOKEN, HubServer

import hear_axlstm
from hear_encoders import AxLSTMConfig, build_encoder, save_checkpoint

PACKAGE = Path(importlib.util.find_spec("hear_encoders").submodule_search_locations[0])
REPO = "org/name"
CARD = "---\nlicense: apache-2.0\n---\n# A small AxLSTM\n\nEmbeds 2 s of sound, in 40 ms steps: größer is not better.\n"

BEGIN = """
import contextlib, io, json, pathlib, runpy, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the library waits between its retries
argument = json.loads(sys.argv[1])
"""
COMMAND = """
from hear_encoders.cli.weights import main as weights_main
result = []
for words in argument:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = weights_main(words)
        except SystemExit as end:  # argparse
            code = end.code
    result.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(result))
"""
PUSH_FILES = """
hub_py, repo_id, paths, private = argument
files = {name: pathlib.Path(path) for name, path in paths.items()}
push_files = runpy.run_path(hub_py)["push_files"]
assert "huggingface_hub" not in sys.modules
try:
    result = {"commit": push_files(repo_id, files, "a message", private=private)}
except Exception as err:
    builtin = type(err).__module__ == "builtins"
    result = {"error": type(err).__qualname__ if builtin else repr(type(err)), "message": str(err)}
print(json.dumps(result))
"""
LOAD = """
import torch, hear_axlstm
model = hear_axlstm.load_model(argument)
print(json.dumps(hear_axlstm.get_scene_embeddings(torch.linspace(-1, 1, 16000)[None], model).tolist()))
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

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
    """Run a program in a new process that knows only this test's server; what it prints as JSON."""

    def run(program: str, argument: Any, home: str = "hf_home", token: str | None = TOKEN, **settings: str) -> Any:
        leaks = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(leaks)}
        env = {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / home), "OMP_NUM_THREADS": "1"}
        env |= {
            name: "1" for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        }
        env |= {"PYTHONPATH": str(PACKAGE.parent)} | ({} if token is None else {"HF_TOKEN": token})
        command = [sys.executable, "-c", BEGIN + program, json.dumps(argument)]
        process = subprocess.run(command, env=env | settings, stdout=subprocess.PIPE, cwd=tmp_path, timeout=120)
        assert process.returncode == 0
        return json.loads(process.stdout.splitlines()[-1])

    return run


@pytest.fixture
def push(client: Client) -> Push:
    """Run `hear-weights push` with each of the given lists of words, one after the other."""

    def run(*commands: list[object], **settings: Any) -> list[Outcome]:
        words = [["push", *(str(word) for word in command)] for command in commands]
        return [Outcome(**outcome) for outcome in client(COMMAND, words, **settings)]

    return run


@pytest.fixture
def push_files(client: Client, tmp_path: Path) -> Client:
    """Call `hub.push_files` with three small files: the commit, or the error's type and message."""
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": CARD.encode()}
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    paths = {name: str(tmp_path / name) for name in files}
    return lambda repo_id=REPO, private=False, **settings: client(
        PUSH_FILES, [str(PACKAGE / "hub.py"), repo_id, paths, private], **settings
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a card, and with other files that are nobody's business."""
    return make_checkpoint(tmp_path / "weights", seed=1)


def make_checkpoint(folder: Path, seed: int) -> Path:
    save_checkpoint(folder, build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1), seed=seed).eval())
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "optimizer.pt").write_bytes(b"not to be published")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "README.md")}


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
    _empty, (commit, message, files) = hub.history(REPO)  # the Hub makes a repository with a commit of its own
    assert files.keys() - contents(folder).keys() == {".gitattributes"}
    assert files.items() >= contents(folder).items()
    assert message == "first weights"
    assert f"{hub.url}/{REPO}/commit/{commit}" in outcome.out
    assert re.search(rf"^commit +{commit}$", outcome.out, re.MULTILINE)
    assert client(LOAD, REPO, token=None) == embeddings(folder)


def test_the_token_and_the_weights_go_where_they_belong(hub, push_files) -> None:
    assert "commit" in push_files()
    (upload,) = [request for request in hub.requests if request.storage]
    assert (upload.method, upload.body) == ("PUT", b"weights")
    assert "authorization" not in upload.headers
    (commit,) = [request for request in hub.requests if "/commit/" in request.path]
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["key"] for line in lines] == ["header", "file", "lfsFile", "file"]


def test_second_push_makes_a_second_commit_and_keeps_what_else_is_there(hub, client, push, folder, tmp_path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=2)
    hub.commit(REPO, {"figure.png": b"png"})
    first, second, again = push(*([path, REPO, "--yes"] for path in (folder, other, other)))
    assert [outcome.code for outcome in (first, second, again)] == [0, 0, 0], (first.err, second.err, again.err)
    _before, (old, _message, old_files), (new, _message, new_files) = hub.history(REPO)
    assert old_files == {"figure.png": b"png", **contents(folder)}
    assert new_files == {"figure.png": b"png", **contents(other)}
    assert old in first.out and new in second.out
    assert new in again.out  # nothing had changed: no commit is made, the one that holds it is named
    assert client(LOAD, REPO, home="fresh") == embeddings(other) != embeddings(folder)


def test_dry_run_shows_all_and_asks_the_hub_nothing(hub, push, folder, tmp_path) -> None:
    card = tmp_path / "MODEL CARD.md"
    card.write_text("# Another card\n")
    plain, other, real = push(
        [folder, REPO], [folder, REPO, "--private", "--card", card], [folder, REPO, "--yes"], token=None
    )
    assert hub.requests == [] and hub.history(REPO) == []
    assert real.code == 2  # so there is no token, and a dry run needs none
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


def test_card_from_elsewhere_is_uploaded_as_readme_to_a_private_repository(hub, push, folder, tmp_path) -> None:
    card = tmp_path / "MODEL_CARD.md"
    (folder / "README.md").rename(card)
    (outcome,) = push([folder, REPO, "--yes", "--private", "--card", card])
    assert outcome.code == 0, outcome.err
    assert hub.is_private(REPO)
    files = hub.history(REPO)[-1][2]
    assert files["README.md"] == CARD.encode()
    assert "MODEL_CARD.md" not in files


def test_what_should_not_be_published_is_refused_before_any_request(hub, push, folder, tmp_path) -> None:
    def spoilt(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / name)

    (spoilt("truncated") / "model.safetensors").write_bytes(b"")
    (spoilt("foreign") / "config.json").write_text('{"family": "resnet"}')
    (spoilt("cardless") / "README.md").unlink()
    (spoilt("blank") / "README.md").write_text(" \n")
    (spoilt("binary") / "README.md").write_bytes(b"\xff\xfe")
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


def test_token_is_sent_even_where_the_library_would_not_of_itself(hub, push_files) -> None:
    assert "commit" in push_files(HF_HUB_DISABLE_IMPLICIT_TOKEN="1")


def test_token_that_may_not_write(hub, push_files) -> None:
    assert_refused(push_files(token="hf_wrong"), "PermissionError", f"'{REPO}'", "401", "HF_TOKEN", "hf auth login")
    hub.fail("create", 403)  # as for an organisation of others
    assert_refused(push_files(), "PermissionError", f"'{REPO}'", "403", "HF_TOKEN", "hf auth login")
    assert hub.history(REPO) == []


def test_public_repository_is_not_pushed_to_as_private(hub, push_files) -> None:
    hub.commit(REPO, {})
    assert_refused(push_files(private=True), "PermissionError", f"'{REPO}'", "public", "nothing was uploaded")
    assert len(hub.history(REPO)) == 1
    assert not any(request.storage for request in hub.requests)
    hub.commit(REPO, {}, private=True)
    assert "commit" in push_files(private=True)


@pytest.mark.parametrize(("what", "name", "method"), [("the look", "main", "POST"), ("the weights", "upload", "PUT")])
def test_error_of_the_hub_leaves_no_commit(hub, push_files, what: str, name: str, method: str) -> None:
    hub.fail(name, 503, method=method)
    assert_refused(push_files(), "ConnectionError", f"'{REPO}'", "503")
    assert len(hub.history(REPO)) == 1
    hub.mend()
    url, commit = push_files()["commit"]
    assert commit == hub.history(REPO)[-1][0] and url.endswith(commit)


def test_metadata_that_the_hub_refuses(hub, push_files) -> None:
    hub.card_errors = ['"license" must be one of a list']
    outcome = push_files()
    assert outcome["error"] == "ValueError"
    assert "README.md" in outcome["message"] and hub.card_errors[0] in outcome["message"]
    assert len(hub.history(REPO)) == 1
    assert not any(request.storage for request in hub.requests)


def test_hub_that_is_not_there(hub, push_files) -> None:
    assert_refused(push_files(HF_HUB_OFFLINE="1"), "ConnectionError", f"'{REPO}'", "offline", "HF_HUB_OFFLINE")
    assert hub.requests == []
    hub.fail("create", 200)  # such as the login page of a network
    assert_refused(push_files(), "ConnectionError", hub.url, "HF_ENDPOINT")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert_refused(push_files(HF_ENDPOINT=closed), "ConnectionError", f"'{REPO}'", closed)
