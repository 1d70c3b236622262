"""Checkpoints on the Hugging Face Hub: download a repository's snapshot, upload a commit.

huggingface_hub is imported only when it is needed, so that importing the package stays quick. Its own settings
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...) apply.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"  # the Hub shows it as the model card
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def fetch_checkpoint(repo_id: str, revision: str | None = None) -> Path:
    """Return a local directory with config.json and model.safetensors of one commit of a Hub repository.

    If the cache holds both files of the revision, no request is made: a branch then stays at the commit that was
    fetched first.

    Args:
        repo_id: the repository, "org/name".
        revision: a branch, a tag or a full commit; None is the default branch, main.

    Returns:
        The snapshot directory in the Hub cache. Both files in it are complete.

    Raises:
        ValueError: `repo_id` is not a valid repository name.
        FileNotFoundError: the repository, the revision or one of the files does not exist on the Hub; or it is
            not in the cache and the Hub cannot be reached or offline mode is on.
        PermissionError: the repository is private or gated and the token, if any, does not open it.
        ConnectionError: the Hub answered with an error, or a download was cut short or damaged.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        check_repo_id(repo_id)
    except ValueError as err:
        raise ValueError(f"{err}, nor is it a local path") from err
    # hf_hub_download(local_files_only=True) is no replacement: late 1.x and 2.x may request a list of AI agents.
    cached = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    if isinstance(cached, str) and Path(cached).with_name(WEIGHTS_FILE).is_file():
        return Path(cached).parent
    where = f"{repo_id!r} at {'its default branch' if revision is None else f'revision {revision!r}'}"
    with _clear_errors(f"fetch {CONFIG_FILE} of {where}", repo_id):
        config = Path(hf_hub_download(repo_id, CONFIG_FILE, revision=revision))
    # Pin the commit: the branch may move before the second download. snapshot_download pins it, too, but needs two more
    # requests, and returns an incomplete directory for a file of another commit or after some failed look-ups.
    commit = config.parent.name
    with _clear_errors(f"fetch {WEIGHTS_FILE} of {where} (commit {commit})", repo_id):
        weights = Path(hf_hub_download(repo_id, WEIGHTS_FILE, revision=commit))
    if weights.parent != config.parent:
        raise ConnectionError(f"asked for commit {commit} of {repo_id!r}, the Hub sent commit {weights.parent.name}")
    return config.parent


def cached_sha256(path: Path) -> str | None:
    """Return the SHA-256 that the Hub stated for a file in its cache; None for other files, and for small ones."""
    blob = os.path.realpath(path)  # the cache holds large files under their hash, and links to them
    return os.path.basename(blob) if re.search(r"[/\\]blobs[/\\][0-9a-f]{64}$", blob) else None


def check_repo_id(repo_id: str) -> None:
    """Check a repository's name without asking the Hub.

    Raises:
        ValueError: the name is not valid.
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if not REPO_ID.fullmatch(repo_id):
            raise ValueError("there must be one '/'")
    except ValueError as err:
        raise ValueError(f"{repo_id!r} is not a valid Hub repository, 'org/name' ({err})") from err


def push_files(repo_id: str, files: Mapping[str, Path], message: str, *, private: bool = False) -> tuple[str, str]:
    """Upload files to the default branch of a model repository in one commit. Create the repository if need be.

    The repository's other files stay. If it already holds all of these files unchanged, no commit is made.

    Args:
        repo_id: the repository, "org/name".
        files: local file by name in the repository.
        message: the commit message; not empty.
        private: make a new repository private, and upload nothing to an existing public one. By default the owner's
            settings decide, usually for public.

    Returns:
        URL and hash of the commit that holds the files.

    Raises:
        ValueError: the name is not valid, or the Hub rejects the model card's metadata.
        FileNotFoundError: one of the local files does not exist.
        PermissionError: there is no token, it does not allow writing, or the repository is public and `private` is
            True.
        ConnectionError: the Hub cannot be reached or answered with an error, or offline mode is on.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    token = get_token()
    if token is None:
        raise PermissionError(f"there is no token to push to {repo_id!r} with: {_LOGIN}, with a token that may write")
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    api = HfApi(token=token)
    with _clear_errors(f"push to {repo_id!r}", repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        # create_repo does not change the visibility of an existing repository.
        is_public = private and not api.repo_info(repo_id).private
        if not is_public:
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=message)
    if is_public:
        raise PermissionError(
            f"nothing was uploaded: {repo_id!r} exists and is public, but private was asked for; make it private on "
            "the Hub, or push without asking for that"
        )
    return commit.commit_url, commit.oid


@contextmanager
def _clear_errors(action: str, repo_id: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into built-in ones that say "cannot {action}", why, and what to do."""
    from huggingface_hub import errors

    http_error: Any = errors.HfHubHTTPError.__bases__[0]  # of requests in 0.x, httpx in 1.x, httpx2 in 2.x
    try:
        yield
    except (OSError, RuntimeError, json.JSONDecodeError, http_error) as err:  # RuntimeError: Xet, hf_transfer
        # A failed look-up is reported as "not in the cache", a failed upload as a RuntimeError, each with its cause.
        is_uncached = isinstance(err, errors.LocalEntryNotFoundError)
        cause = (err.__cause__ or err) if is_uncached or isinstance(err, RuntimeError) else err
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None  # from the disk, not from the network
        kind, reason = _explain(cause, repo_id, is_uncached)
        details = " ".join(str(cause).split())
        raise kind(f"cannot {action}: {reason} ({type(cause).__name__}: {details})") from err


def _explain(cause: BaseException, repo_id: str, is_uncached: bool) -> tuple[type[OSError], str]:
    """Return the built-in exception for an error of huggingface_hub, the reason and the remedy."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return PermissionError, f"access is gated (HTTP {status}): request it on {page}, then {_LOGIN}"
    if status in (401, 403):  # the Hub answers 401 for a missing repository, too, unless it gets a valid token
        hint = "check the name: the repository may not exist, and no such local path does"
        return PermissionError, f"no access (HTTP {status}): {_LOGIN} with an account that has it, or {hint}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return FileNotFoundError, "no such revision on the Hub: give a branch, a tag or a full commit"
    if isinstance(cause, errors.EntryNotFoundError) and status == 404:
        return FileNotFoundError, f"no such file there: a checkpoint needs both {CONFIG_FILE} and {WEIGHTS_FILE}"
    if status == 404:
        return FileNotFoundError, "no such repository or file on the Hub, and no such local path"
    if status not in (None, 416):  # 416: the partial file of an earlier download, see below
        return ConnectionError, f"the Hub answered HTTP {status}: try again later"
    if isinstance(cause, (errors.FileMetadataError, json.JSONDecodeError)):
        return ConnectionError, f"{constants.ENDPOINT} does not answer as a Hub does: check HF_ENDPOINT and proxies"
    kind = FileNotFoundError if is_uncached else ConnectionError
    reason = f"it is not in the cache ({constants.HF_HUB_CACHE}) and " if is_uncached else ""
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return kind, f"{reason}offline mode is on: unset HF_HUB_OFFLINE"
    reason += f"the Hub ({constants.ENDPOINT}) could not be reached or did not finish its answer: try again"
    blobs = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "blobs")
    if any(blobs.glob("*.incomplete")):  # some versions of the library cannot complete it
        reason += f"; if that fails, delete {blobs / '*.incomplete'}"
    return kind, reason
