"""Checkpoints on the Hugging Face Hub: the local snapshot directory of a repository, and a commit to one.

huggingface_hub is imported only when it is needed, so that importing the package stays quick; its settings (HF_HOME,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...) mean what they mean to that library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"  # what the Hub shows as the model card
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch_checkpoint(repo_id: str, revision: str | None = None) -> Path:
    """Return the local directory of a Hub repository's snapshot that holds config.json and model.safetensors.

    If the cache holds both files of the revision, no request is made: a branch then stays at the commit at which
    it was first fetched. Otherwise the revision is looked up on the Hub, and both files come from that one commit.

    Args:
        repo_id: the repository, "org/name".
        revision: a branch, a tag or a full commit; None is the default branch, main.

    Returns:
        The snapshot directory in the Hub cache. Both files in it are complete.

    Raises:
        ValueError: `repo_id` cannot be the name of a repository.
        FileNotFoundError: the repository, the revision or one of the files does not exist on the Hub; or it is
            not in the cache and the Hub cannot be asked (offline mode is on, or it could not be reached).
        PermissionError: the repository is private or gated and the token, if any, does not open it.
        ConnectionError: the Hub answered with an error, or a download was cut short or arrived damaged.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # Not hf_hub_download(local_files_only=True): late 1.x and 2.x may still ask the Hub for its list of AI agents.
        cached = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    except HFValidationError as err:
        raise ValueError(f"{repo_id!r} is neither a local path nor a Hub repository, 'org/name': {err}") from err
    # What is not a path is None or the mark of a file known not to exist.
    if isinstance(cached, str) and (Path(cached).parent / WEIGHTS_FILE).is_file():
        return Path(cached).parent
    where = f"{repo_id!r} at {'its default branch' if revision is None else f'revision {revision!r}'}"
    config = _download(repo_id, CONFIG_FILE, revision, where)
    # A snapshot directory is named after its commit; the branch may have moved since, which must not mix the files.
    commit = config.parent.name
    weights = _download(repo_id, WEIGHTS_FILE, commit, where if commit == revision else f"{where} (commit {commit})")
    if weights.parent != config.parent:
        raise ConnectionError(f"asked for commit {commit} of {repo_id!r}, the Hub sent commit {weights.parent.name}")
    return config.parent


def _download(repo_id: str, filename: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        # A file gets to its place only once its size is the announced one (with Xet: its hash), so none is partial.
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except _errors() as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # from the disk, not from the network
        raise _explain(err, repo_id, filename, where) from err


def _errors() -> tuple[type[Exception], ...]:
    """What the functions of huggingface_hub raise when the disk or the network fails them."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP client is requests in 0.x (all its errors are OSErrors), httpx in 1.x and httpx2 in 2.x (all its errors
    # have the first base of the library's); the Xet and hf_transfer backends raise RuntimeError.
    return OSError, RuntimeError, HfHubHTTPError.__bases__[0]


def _status(err: BaseException) -> int | None:
    """The HTTP status that an error is about, if it is about one."""
    return getattr(getattr(err, "response", None), "status_code", None)


def _explain(err: Exception, repo_id: str, filename: str, where: str) -> OSError:
    """The built-in exception that says what went wrong and what to do, for an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    file = f"{filename} of {where}"
    # The library reports a failed look-up of an uncached file as "not in the cache"; the cause says why it failed.
    cause = err.__cause__ or err if isinstance(err, errors.LocalEntryNotFoundError) else err
    status = _status(cause)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{file} is not in the cache ({constants.HF_HUB_CACHE}) and offline mode is on: "
            "unset HF_HUB_OFFLINE to download it, or give a local directory"
        )
    if isinstance(cause, errors.GatedRepoError):
        return PermissionError(
            f"{file} is gated (HTTP {status}): ask for access on {constants.ENDPOINT}/{repo_id}, then set HF_TOKEN "
            "or run `hf auth login` with an account that has it"
        )
    if status in (401, 403):  # the Hub answers 401 for what does not exist, too, unless a valid token comes along
        return PermissionError(
            f"no access to {file} (HTTP {status}): if the repository is private, set HF_TOKEN or run `hf auth login` "
            "with an account that may read it; else check the name, it may not exist (no such local path does)"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return FileNotFoundError(f"no such revision on the Hub, looking for {file}: give a branch, tag or full commit")
    if isinstance(cause, errors.EntryNotFoundError) and status == 404:
        return FileNotFoundError(f"there is no {file}: a checkpoint needs both {CONFIG_FILE} and {WEIGHTS_FILE}")
    if status == 404:
        what = "repository" if isinstance(cause, errors.RepositoryNotFoundError) else "repository or file"
        return FileNotFoundError(f"no such {what} on the Hub and no such local path, looking for {file}")
    if status not in (None, 416):  # 416 is about the partial file of an earlier download, see below
        return ConnectionError(f"the Hub answered HTTP {status} for {file}: try again later")
    if isinstance(cause, errors.FileMetadataError):
        return ConnectionError(
            f"{constants.ENDPOINT} did not answer as a Hub does for {file}: check HF_ENDPOINT and proxies ({cause})"
        )
    if cause is not err:
        return FileNotFoundError(
            f"{file} is not in the cache ({constants.HF_HUB_CACHE}) and the Hub ({constants.ENDPOINT}) could not be "
            f"reached: check the connection, or give a local directory ({type(cause).__name__}: {cause})"
        )
    partial = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs" / "*.incomplete"
    return ConnectionError(
        f"the download of {file} failed: try again; if it still fails, delete {partial}, which some versions of "
        f"huggingface_hub cannot complete ({type(cause).__name__}: {cause})"
    )


def check_repo_id(repo_id: str) -> None:
    """Check, without asking the Hub, that a repository may have this name.

    Raises:
        ValueError: it may not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not the name of a Hub repository: expected 'org/name'")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ValueError(f"{repo_id!r} cannot be the name of a Hub repository: {err}") from err


def push_files(repo_id: str, files: Mapping[str, Path], message: str, *, private: bool = False) -> tuple[str, str]:
    """Upload files to the default branch of a model repository, in one commit; the repository is made if need be.

    Files of other names that the repository holds stay as they are. If it holds all of these already, unchanged,
    there is no new commit.

    Args:
        repo_id: the repository, "org/name".
        files: the local file of each name in the repository.
        message: of the commit; not empty.
        private: make the repository private if it is new, and upload nothing if it is there and public. Otherwise
            a new repository is what its owner's settings say, public as a rule.

    Returns:
        URL and hash of the commit that holds the files.

    Raises:
        ValueError: the name is not one of a repository, or the Hub finds the metadata of the card invalid.
        FileNotFoundError: one of the files is not there.
        PermissionError: there is no token, it may not write to the repository, or the repository is public though
            `private` was asked for.
        ConnectionError: the Hub cannot be reached, offline mode is on, or it answered with an error.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    token = get_token()
    if token is None:
        raise PermissionError(
            f"there is no token to upload to {repo_id!r} with: set HF_TOKEN or run `hf auth login`, with a token that "
            "may write to it"
        )
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        # `private` means nothing for a repository that is there already: what it is must be asked.
        exposed = private and not api.repo_info(repo_id).private
        if not exposed:
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=message)
    except (*_errors(), json.JSONDecodeError) as err:
        # The library reports the failed upload of a large file as a RuntimeError; the cause says why it failed.
        cause = err.__cause__ if isinstance(err, RuntimeError) and isinstance(err.__cause__, Exception) else err
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None  # from the disk, not from the network
        raise _explain_push(cause, repo_id) from err
    if exposed:
        raise PermissionError(
            f"the repository {repo_id!r} is there already and public, though private was asked for: nothing was "
            "uploaded; make it private on the Hub, or push without asking for that"
        )
    return commit.commit_url, commit.oid


def _explain_push(err: Exception, repo_id: str) -> OSError:
    """The built-in exception that says what went wrong and what to do, for an error of huggingface_hub in a push."""
    from huggingface_hub import constants, errors

    status = _status(err)
    details = " ".join(str(err).split())  # with the Hub's own words, in one line
    if isinstance(err, errors.OfflineModeIsEnabled):
        return ConnectionError(f"nothing was uploaded to {repo_id!r}, offline mode is on: unset HF_HUB_OFFLINE")
    if status in (401, 403):
        return PermissionError(
            f"the Hub does not let this token write to {repo_id!r} (HTTP {status}): set HF_TOKEN or run "
            f"`hf auth login` with a token that may ({details})"
        )
    if status is not None:
        return ConnectionError(f"the Hub answered HTTP {status} to the upload to {repo_id!r} ({details})")
    if isinstance(err, json.JSONDecodeError):
        return ConnectionError(
            f"{constants.ENDPOINT} did not answer as a Hub does: check HF_ENDPOINT and proxies ({details})"
        )
    return ConnectionError(
        f"the upload to {repo_id!r} failed, the Hub ({constants.ENDPOINT}) could not be reached or did not finish its "
        f"answer: try again ({type(err).__name__}: {details})"
    )
