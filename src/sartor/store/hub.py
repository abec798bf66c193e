"""Model hubs: Hugging Face (through huggingface_hub) and ModelScope (its public file API).

ModelScope's own library brings dozens of packages for what are two GET requests, hence the small
client here: ``/api/v1/models/{id}/repo/files`` lists, ``/api/v1/models/{id}/repo`` delivers and
honours Range.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from sartor.store.download import (
    Patience,
    RemoteFile,
    download,
    explain_status,
    session,
)
from sartor.store.equal import EqualFiles, bytes_on_disk
from sartor.store.progress import Progress
from sartor.store.reference import ModelRef, is_safe_relative
from sartor.store.source import Fetched, FileRecord, SourceError, choose_files, shards_of

MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"
_FIRST_BYTE_RESERVE = 1.5  # seconds of the patience that listing leaves to the first file


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of one revision of a repository."""

    revision: str
    files: dict[str, RemoteFile]
    headers: dict[str, str]
    license: str | None = None


def fetch_hub(
    ref: ModelRef,
    prefer: Sequence[str],
    folder: Path,
    progress: Progress,
    equal: EqualFiles,
    room: Callable[[], int | None],
) -> Fetched:
    """Bring the files that make the model ``ref`` into ``folder``; those that ``equal`` has are not
    fetched again. ``room`` gives the bytes of memory that are available.

    Raises SourceError where the hub cannot be reached or has no such model, OSError(ENOSPC)
    where it does not fit the disk.
    """
    listing = _huggingface if ref.kind == "hf" else _modelscope
    patience = Patience()
    try:
        repository = patience.wait(lambda: listing(ref), str(ref), keep=_FIRST_BYTE_RESERVE)
    except SourceError:
        raise
    except Exception as error:  # whatever the HTTP client and the hub's library raise
        raise SourceError(f"{ref} cannot be reached ({_first_line(error)})") from error
    if ref.file is None:
        names = choose_files(
            repository.files,
            prefer,
            str(dataclasses.replace(ref, quant=None)),
            sizes={name: file.size for name, file in repository.files.items()},
            quant=ref.quant,
            room=room,
            say=progress.notice,
        )
    else:
        names = shards_of(ref.file, repository.files)
        if ref.file not in repository.files:
            raise SourceError(f"{ref}: the repository has no file {ref.file}")
    chosen = [repository.files[name] for name in names]
    shared = {file.path: record for file in chosen if (record := _shared(file, folder, equal))}
    for path in shared:
        progress.notice(f"{path} is here already, as a file of another model")
    _require_space([file for file in chosen if file.path not in shared], folder)
    records = tuple(
        shared.get(f.path) or download(f, folder, repository.headers, progress, patience)
        for f in chosen
    )
    file = f"/{ref.file or names[0]}" if names[0].lower().endswith(".gguf") else ""
    origin = f"{ref.kind}:{ref.name}@{repository.revision}{file}"
    return Fetched(origin, records, repository.license)


def _shared(remote: RemoteFile, folder: Path, equal: EqualFiles) -> FileRecord | None:
    """The file as a link to an equal one of the store; None where there is none."""
    if remote.sha256 is None or remote.size is None:
        return None
    if not equal.share(folder / remote.path, remote.sha256, remote.size):
        return None
    return FileRecord(remote.path, remote.size, remote.sha256.lower(), True)


def _huggingface(ref: ModelRef) -> Repository:
    from huggingface_hub import HfApi, constants, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    try:
        info = HfApi(endpoint=endpoint).model_info(
            ref.name, revision=_revision(ref), files_metadata=True, timeout=10
        )
    except RevisionNotFoundError as error:
        raise SourceError(f"{ref}: the repository has no revision {ref.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " (HF_TOKEN)" if status in (401, 403) else ""
        raise SourceError(f"{ref}: {explain_status(status)}{hint}") from error
    revision = info.sha or _revision(ref) or "main"
    files = {}
    for sibling in info.siblings or []:
        name = sibling.rfilename
        if is_safe_relative(name):
            files[name] = RemoteFile(
                path=name,
                url=hf_hub_url(ref.name, name, revision=revision, endpoint=endpoint),
                size=sibling.lfs.size if sibling.lfs else sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_sha1=None if sibling.lfs else sibling.blob_id,
            )
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    card = info.card_data
    return Repository(revision, files, headers, card.get("license") if card else None)


def _modelscope(ref: ModelRef) -> Repository:
    domain = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
    endpoint = (domain or MODELSCOPE_ENDPOINT).rstrip("/")
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    revision = _revision(ref) or "master"
    base = f"{endpoint}/api/v1/models/{ref.name}/repo"
    response = session().get(
        f"{base}/files?Revision={quote(revision)}&Recursive=true",
        headers=headers,
        timeout=10,
        follow_redirects=True,
    )
    if response.status_code >= 400:
        raise SourceError(f"{ref}: {explain_status(response.status_code)}")
    answer = response.json()
    if answer.get("Code") != 200:
        raise SourceError(f"{ref}: the hub answered {answer.get('Message') or answer.get('Code')}")
    files = {}
    for item in answer["Data"]["Files"]:
        name = item["Path"]
        if item.get("Type") != "tree" and is_safe_relative(name):
            url = f"{base}?Revision={quote(revision)}&FilePath={quote(name, safe='')}"
            files[name] = RemoteFile(name, url, item.get("Size"), item.get("Sha256") or None)
    return Repository(revision, files, headers)


def _revision(ref: ModelRef) -> str | None:
    """As the hub knows it: a reference writes "/" as %2F."""
    return unquote(ref.revision) if ref.revision else None


def _require_space(files: Sequence[RemoteFile], folder: Path) -> None:
    present = bytes_on_disk(folder)
    needed = sum(f.size or 0 for f in files) - present
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
