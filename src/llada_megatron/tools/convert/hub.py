"""Checkpoints from and to the Hugging Face hub, through the package `huggingface_hub` (the extra `hub`)."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llada_megatron import __version__
from llada_megatron.console import message, size_text
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, LladaError, ResourceError
from llada_megatron.llada_moe.huggingface.safetensors_reader import INDEX_NAME, SUFFIX
from llada_megatron.llada_moe.huggingface.tokenizer_export import FILES as TOKENIZER_FILES
from llada_megatron.tools.convert.huggingface_source import CONFIG, GENERATION_CONFIG

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
WANTED = (CONFIG, GENERATION_CONFIG, f"*{SUFFIX}", INDEX_NAME, *TOKENIZER_FILES)
"""Patterns of the files of a repository that an import reads; code is not among them."""


def is_repository(source: str) -> bool:
    """Whether what the user gave is ORG/NAME or ORG/NAME@REVISION, and nothing on this machine."""
    return _NAME.fullmatch(source) is not None and not Path(source).exists()


def download(source: str) -> Path:
    """The folder in the hub's cache that holds a repository's weights and tokenizer; what is missing is downloaded.

    A message says how many files and bytes the repository has and how many of them come over the network. Nothing
    does if HF_HUB_OFFLINE is set.

    Args:
        source: ORG/NAME or ORG/NAME@REVISION.

    Raises:
        CheckpointError: there is no such repository, it holds no weights, or it cannot be reached.
        ConfigError: the package is not installed.
        ResourceError: the cache's disk is too small.
    """
    match = _NAME.fullmatch(source)
    assert match is not None
    repository, revision = match["repository"], match["revision"]
    hub = _package(source)
    with _explained(hub, source):
        if hub.constants.HF_HUB_OFFLINE:
            return Path(
                hub.snapshot_download(repository, revision=revision, allow_patterns=list(WANTED), local_files_only=True)
            )
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = _wanted(info.siblings or [])
        if not any(name.endswith(SUFFIX) for name in sizes):
            others = sorted(each.rfilename for each in info.siblings or [])
            raise CheckpointError(
                f"{source} on the hub holds no {SUFFIX} file (but {', '.join(others[:5]) or 'nothing'}): name a "
                "repository with the whole model"
            )
        missing = {
            name: size
            for name, size in sizes.items()
            if not isinstance(hub.try_to_load_from_cache(repository, name, revision=info.sha), str)
        }
        cache = Path(hub.constants.HF_HUB_CACHE)
        what = f"{source} on the hub, revision {info.sha[:12]}: {len(sizes)} files, {size_text(sum(sizes.values()))}"
        coming = f"{len(missing)} of them, {size_text(sum(missing.values()))}, are downloaded to {cache}"
        message(f"{what}; {coming if missing else f'all are in {cache}'}")
        _require_space(cache, sum(missing.values()))
        return Path(hub.snapshot_download(repository, revision=info.sha, allow_patterns=sorted(sizes)))


def require_push(repository: str) -> None:
    """Find out before a long export that it could not be published.

    Raises:
        ConfigError: the name is none, the package is not installed, HF_HUB_OFFLINE is set, or nobody is logged in.
        CheckpointError: the hub cannot be reached.
    """
    match = _NAME.fullmatch(repository)
    if match is None or match["revision"]:
        raise ConfigError(f"--push {repository}: a repository is named ORG/NAME")
    hub = _package(f"--push {repository}")
    if hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push {repository}: HF_HUB_OFFLINE is set; unset it, or export without --push")
    with _explained(hub, f"--push {repository}"):
        hub.HfApi().whoami()


def push(directory: Path, repository: str) -> str:
    """Upload an export to the hub; a repository that is not there yet is made, private. Returns its address.

    Raises:
        LladaError: it failed; the export in `directory` is whole, and the message says how to upload it again.
    """
    hub = _package(f"--push {repository}")
    again = f"the export in {directory} is whole: `hf upload {repository} {directory}` uploads it"
    with _explained(hub, f"--push {repository}", again):
        api = hub.HfApi()
        url = str(api.create_repo(repository, private=True, exist_ok=True))
        message(f"uploading {directory} to {url}")
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=f"Export of llada-megatron {__version__}"
        )
        return url


def _package(what: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors  # the package itself imports no module of its own before it is needed
    except ImportError:
        raise ConfigError(
            f"{what}: no such directory here, and a repository of the hub needs the package huggingface_hub: "
            "pip install 'llada-megatron[hub]'"
            if not what.startswith("--")
            else f"{what} needs the package huggingface_hub: pip install 'llada-megatron[hub]'"
        ) from None
    return huggingface_hub


def _wanted(siblings: list[Any]) -> dict[str, int]:
    """Name and size in bytes of the files at the top of a repository that an import reads."""
    return {
        each.rfilename: each.size or 0
        for each in siblings
        if "/" not in each.rfilename and any(fnmatch.fnmatchcase(each.rfilename, pattern) for pattern in WANTED)
    }


def _require_space(cache: Path, needed: int) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{cache}: {size_text(free)} are free and {size_text(needed)} are to be downloaded: make room, or set "
            "HF_HOME to a place on another disk"
        )


@contextlib.contextmanager
def _explained(hub: ModuleType, what: str, more: str = "") -> Iterator[None]:
    """Errors of the package as errors of ours, in one line; `more` is added to each."""
    errors = hub.errors
    end = f"; {more}" if more else ""
    nowhere = "" if what.startswith("--") else "no such directory here, and "
    try:
        yield
    except LladaError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{what}: access to the repository must be asked for on its page, and `hf auth login` be run{end}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{what}: neither a directory here nor a repository on the hub that this account may see; check the name, "
            f"and run `hf auth login` for a private one{end}"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{what}: the repository has no such revision{end}") from None
    except errors.LocalTokenNotFoundError:
        raise ConfigError(f"{what}: nobody is logged in: run `hf auth login`, or set HF_TOKEN{end}") from None
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set and " if hub.constants.HF_HUB_OFFLINE else "the hub cannot be reached and "
        raise CheckpointError(
            f"{what}: {offline}the cache {hub.constants.HF_HUB_CACHE} does not hold it: download it where there is a "
            f"network (`hf download {what.replace('@', ' --revision ')}`) and copy the cache, or give a directory"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise CheckpointError(f"{what}: {nowhere}the hub answers: {_line(error)}{end}") from error
    except (*errors.HfHubHTTPError.__bases__, OSError) as error:  # with the base of the network package's errors
        raise CheckpointError(f"{what}: {nowhere}the hub cannot be reached ({_line(error)}){end}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
