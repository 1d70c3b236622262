"""Checkpoints from the Hugging Face Hub: the local snapshot directory of a repository.

huggingface_hub is imported only when a checkpoint is fetched, so that importing the package stays quick; its
settings (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...) mean what they mean to that library.
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


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
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP client is requests in 0.x (all its errors are OSErrors), httpx in 1.x and httpx2 in 2.x (all its errors
    # have the first base of the library's); the Xet and hf_transfer backends raise RuntimeError.
    client_error = HfHubHTTPError.__bases__[0]
    try:
        # A file gets to its place only once its size is the announced one (with Xet: its hash), so none is partial.
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except (OSError, RuntimeError, client_error) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # from the disk, not from the network
        raise _explain(err, repo_id, filename, where) from err


def _explain(err: Exception, repo_id: str, filename: str, where: str) -> OSError:
    """The built-in exception that says what went wrong and what to do, for an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    file = f"{filename} of {where}"
    # The library reports a failed look-up of an uncached file as "not in the cache"; the cause says why it failed.
    cause = err.__cause__ or err if isinstance(err, errors.LocalEntryNotFoundError) else err
    status = getattr(getattr(cause, "response", None), "status_code", None)
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
