"""The push stage: from a run to a repository on the Hugging Face hub."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpdeploy.errors import LpdeployError, OptionError, quote_error
from lpdeploy.machine import format_bytes
from lpdeploy.models.find import is_local
from lpdeploy.publish.files import Upload, list_uploads
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What would be uploaded, or was.

    Attributes:
        repo: The repository, ``owner/name``.
        visibility: ``private`` or ``public``, if the repository is new.
        files: The files.
        base_model: Hub name of the unpruned model, or the last part of its path.
        base_is_local: Whether it is a folder on this machine.
        url: Address of the repository; None where nothing was uploaded.
        commit: Hash of the commit; None where nothing was uploaded.
    """

    repo: str
    visibility: str
    files: tuple[Upload, ...]
    base_model: str
    base_is_local: bool
    url: str | None = None
    commit: str | None = None

    @property
    def uploaded(self) -> bool:
        """Whether the files were uploaded."""
        return self.commit is not None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; without ``url`` and ``commit`` where nothing was uploaded."""
        names = ("repo", "visibility", "base_model", "base_is_local", "bytes", "uploaded")
        data = {name: getattr(self, name) for name in names}
        data["files"] = [
            {"path": file.path, "source": str(file.source), "bytes": file.size}
            for file in self.files
        ]
        return data | ({"url": self.url, "commit": self.commit} if self.uploaded else {})


def push(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    execute: bool = False,
) -> PushResult:
    """Say what of a run would be uploaded and, where asked to, upload it in one commit.

    A repository that is there already keeps its visibility and its other files; files of the same
    name are replaced.

    Args:
        run: What ``prune`` and ``compact`` wrote.
        repo: ``owner/name``.
        private: Whether a new repository is only for its owner.
        execute: Upload; otherwise nothing leaves this machine.

    Raises:
        LpdeployError: The run has no model, the name is none, nobody is logged in, or the hub is
            out of reach or refuses.
    """
    _check_name(repo)
    run = RunFolder(run)
    base = run.load_plan().base_model
    result = PushResult(
        repo=repo,
        visibility="private" if private else "public",
        files=tuple(list_uploads(run, repo=repo)),
        base_model=Path(base).name if is_local(base) else base,
        base_is_local=is_local(base),
    )
    if not execute:
        return result
    size = format_bytes(result.bytes)
    logger.info("uploading %s files, %s, to %s", len(result.files), size, repo)
    with run.hold(shared=True):
        url, commit = _upload(result.files, repo, private=private)
    return replace(result, url=url, commit=commit)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"`repo` '{repo}': {quote_error(error)}. Give owner/name.") from error
    if not _NAME.fullmatch(repo):
        raise OptionError(f"`repo` '{repo}' names no owner. Give owner/name.")


def _upload(uploads: Sequence[Upload], repo: str, *, private: bool) -> tuple[str, str]:
    """Upload in one commit; return the address of the repository and the hash of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise LpdeployError("Not logged in to the hub. Run 'hf auth login', or set HF_TOKEN.")
    api = HfApi(library_name="lpdeploy")
    operations = [
        CommitOperationAdd(
            path_in_repo=upload.path,
            path_or_fileobj=upload.source if upload.content is None else upload.content,
        )
        for upload in uploads
    ]
    with _explain_hub(api.endpoint, repo):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message="Upload a model pruned by lpdeploy"
        )
    return str(url), commit.oid


@contextmanager
def _explain_hub(endpoint: str, repo: str) -> Iterator[None]:
    """Turn what the hub, or the way to it, refuses into a sentence.

    Raises:
        LpdeployError: That.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise LpdeployError(
            "The hub is switched off by HF_HUB_OFFLINE. Unset it to upload."
        ) from error
    except HfHubHTTPError as error:
        reason = (error.server_message or str(error)).strip().split("\n")[0].rstrip(".")
        raise LpdeployError(
            f"The hub refuses '{repo}': {reason}. Check the name, and that 'hf auth whoami' may "
            "write there."
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise LpdeployError(
            f"{endpoint} cannot be reached ({quote_error(error)}). Check the network and try "
            "again: what is there already is not uploaded twice."
        ) from error
