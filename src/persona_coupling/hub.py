"""The Hugging Face hub, asked before anything is fetched: is it there, may we, and how much is it?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persona_coupling.errors import UserError

if TYPE_CHECKING:
    from persona_coupling.models import HubModel

DESCRIBING = ("*.json", "*.jinja", "*.txt", "*.model")  # all but the weights: a few megabytes
TIMEOUT = 10.0  # seconds for one answer
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Snapshot:
    """A revision of a repository as the hub lists it."""

    repository: str
    revision: str
    megabytes: float  # of the files that are fetched


def cached(repository: str, revision: str) -> Path | None:
    """The snapshot's folder if all of it, weights included, is in the hub's cache of this machine."""
    folder = _local(repository, revision)
    if folder is None or not (folder / "config.json").is_file():
        return None
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return folder if all((folder / name).is_file() for name in names) else None


def described(source: HubModel) -> Path | None:
    """The folder with the snapshot's configuration and tokenizer, if they are in the cache."""
    folder = _local(source.repository, source.revision)
    return folder if folder and (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file() else None


def kept(repository: str) -> Path:
    """Where the hub's cache keeps a model's files, whether or not there are any: snapshots, and what their links lead to."""
    return cache_root() / f"models--{repository.replace('/', '--')}"


def _local(repository: str, revision: str) -> Path | None:
    folder = kept(repository) / "snapshots" / revision
    return folder if folder.is_dir() else None


def cache_root() -> Path:
    """Where the hub's files are kept (`$HF_HOME` moves it)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def look(repository: str, revision: str, patterns: tuple[str, ...], kind: Kind = "model") -> Snapshot:
    """Ask the hub for a revision, once and without retries. Raises UserError with one sentence when it cannot be
    reached, has no such thing, or does not give it to us."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    with _sentences(repository, revision, kind):
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        found: Any = ask(repository, revision=revision, timeout=TIMEOUT, files_metadata=True)
    files = [f for f in found.siblings or [] if any(fnmatch(f.rfilename, pattern) for pattern in patterns)]
    return Snapshot(repository, revision, sum(f.size or 0 for f in files) / 2**20)


def describe(source: HubModel) -> Path:
    """Fetch the configuration and the tokenizer, not the weights. Raises UserError as `look` does."""
    from huggingface_hub import snapshot_download

    with _sentences(source.repository, source.revision, "model"):
        return Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=list(DESCRIBING)))


class _sentences:
    """Turns the hub's errors inside into one sentence with the remedy."""

    def __init__(self, repository: str, revision: str, kind: Kind) -> None:
        self.name, self.what = f"{repository} at {revision[:12]}", f"the {kind} {repository}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        from huggingface_hub import errors

        elsewhere = "or give a local folder with `--model FOLDER`"
        if isinstance(error, errors.GatedRepoError):
            said = (
                f"The hub gives {self.what} only to those who accepted its terms: accept them on its page and log in "
            )
            said += f"with `hf auth login`, {elsewhere}."
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = f"The hub has no {self.what.removeprefix('the ')}, or it is private: check the name, log in with "
            said += f"`hf auth login`, {elsewhere}."
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"The hub has {self.what}, but not this revision of it ({self.name}): give a commit that it has."
        elif isinstance(error, errors.HTTPError | OSError | ValueError):  # type: ignore[attr-defined]
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            said = f"The hub could not be reached for {self.name} ({reason}): check the network, {elsewhere}."
        else:
            return
        raise UserError(said) from error
