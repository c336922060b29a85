"""What comes from strangers, looked at before anything opens it: model folders, datasets, artifacts, parts of results.

Nothing in here loads a model or a table: names, sizes, links and small JSON files are read, and what is refused is named
with the file, where it has lines the line, and the limit. `docs/THREATS.md` says what this defends and what it does not.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from persona_coupling import hub
from persona_coupling.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
DATASETS = (".jsonl", ".json", ".ndjson")
POINTER = "pointer.json"  # of an artifact that stands for a folder elsewhere, see `models`
TABLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
CODE = ("auto_map", "custom_pipelines")  # keys of a configuration under which it names code
KERNELS = tuple(f"{private}{part}_implementation" for private in ("", "_") for part in ("attn", "experts"))
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REVISION = re.compile(r"[\w-][\w.-]*")

# Limits: raising one admits larger inputs and costs as much memory, several times over once they are parsed
JSON_BYTES = 64 * 2**20  # of one JSON file: the largest tokenizers have 35 MB
TEMPLATE_BYTES = 2**20
LINE_BYTES = 2**20  # of one row; a message in it may have corpora.MAXIMUM_CHARACTERS
ROWS = 1_000_000  # of one dataset
DATASET_BYTES = 2**30
FILES = 1_000  # in a model folder
TABLE_BYTES = 2 * 2**30  # of one table, unpacked: a table of a few kilobytes can claim any number


def _plain_name(name: Any) -> bool:
    """Whether it is a file's name without any path, on this and on other systems."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def inside(name: Any) -> bool:
    """Whether a relative path with forward slashes stays within its folder, by its text alone."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and not PureWindowsPath(name).drive and ".." not in path.parts and str(path) == name


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises UserError, naming file and limit, when it has more than JSON_BYTES, is nested too
    deeply, or is no JSON."""
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise UserError(f"{path} has {size} bytes, more than the {JSON_BYTES} allowed of a JSON file.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}).") from error


def _entries(folder: Path, within: Path) -> list[Path]:
    """All files under a folder. Raises UserError for a link out of `within`, for what is neither file nor folder, and
    for too many of them."""
    files: list[Path] = []
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            if path.is_symlink() and not path.resolve().is_relative_to(within):
                raise UserError(f"{path} is a link to {path.resolve()}, outside {within}. Put the file itself there.")
            if path.is_dir():
                if not path.is_symlink():  # files behind a linked folder stand in it once already
                    waiting.append(path)
            elif path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path} is neither a file nor a folder.")
            else:
                files.append(path)
            if len(files) + len(waiting) > FILES:
                raise UserError(f"{folder} holds more than {FILES} files: that is no model folder.")
    return files


# ------------------------------------------------------------------------------------------------ models


def check_model(folder: Path, *, cache: Path | None = None) -> None:
    """Raise UserError unless a model folder can be loaded without running anything of its author's.

    Refused: pickled files by their names, configurations that name code (`auto_map`) or another model in place of the
    weights (`adapter_config.json`), indexes and links that lead out of the folder, oversized JSON. `cache` is the folder
    of the hub's cache that a snapshot's links may lead into; other programs keep files there, so pickled ones are not
    asked about: nothing but safetensors is ever opened.
    """
    if not folder.is_dir():
        return  # whoever loads it says so
    folder = folder.resolve()
    for path in _entries(folder, (cache or folder).resolve()):
        name = path.relative_to(folder).as_posix()
        if cache is None and path.suffix.lower() in PICKLES:
            raise UserError(
                f"{path} may be pickled, and a pickle runs its author's code when it is opened. Only safetensors are "
                "read: remove it, or convert the weights with a tool that you trust."
            )
        if path.name == "adapter_config.json":
            raise UserError(f"{path} puts another model in place of this one. Give a folder with merged weights.")
        if path.suffix == ".jinja" and path.stat().st_size > TEMPLATE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {TEMPLATE_BYTES} of a template.")
        if path.suffix == ".json" and "/" not in name:
            _check_configuration(path, folder)


def _check_configuration(path: Path, folder: Path) -> None:
    content = read_json(path)
    if path.name.endswith(".index.json"):
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            raise UserError(f"{path} has no `weight_map`.")
        for shard in sorted({str(value) for value in shards.values()}):
            if not _plain_name(shard) or not shard.endswith(".safetensors"):
                raise UserError(f"{path} names the file {shard!r}: a name of a .safetensors file beside it is allowed.")
            if not (folder / shard).is_file():
                raise UserError(f"{path} names the file {shard}, which is not there. Copy the model again.")
    elif path.name != "tokenizer.json":
        where = _key_of_code(content)
        if where:
            raise UserError(
                f"{path} names code to run (`{where}`). Code of a model's author is never run: choose a model whose "
                "architecture is part of transformers."
            )
        weights = content.get("transformers_weights") if isinstance(content, dict) else None
        if weights is not None and not (_plain_name(weights) and weights.endswith(".safetensors")):
            raise UserError(f"{path} names the weights {weights!r}: a .safetensors file beside it is allowed.")


def _key_of_code(value: Any) -> str:
    """The first key under which a configuration names code, wherever it is nested; empty for none."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for key in CODE:
                if item.get(key):
                    return key
            for key in KERNELS:  # `owner/name` is a kernel on the hub; words such as `sdpa` are transformers' own
                if "/" in json.dumps(item.get(key)):
                    return key
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return ""


def check_pointer(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise UserError when an artifact's pointer names another model than its description, or the model in the hub's
    cache is not one that `check_model` lets through. Artifacts without a pointer to the hub are none of its business."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return
    target = read_json(pointer)
    if not isinstance(target, dict) or "repository" not in target:
        return  # a local folder: its place is the run's own argument, and Study looks at it
    named = {key: target.get(key) for key in ("repository", "revision")}
    if named != {key: description.get(key) for key in named}:
        raise UserError(f"{pointer} leads to {named}, another model than it was made for. Delete {folder}.")
    repository, revision = str(named["repository"]), str(named["revision"])
    if not REPOSITORY.fullmatch(repository) or not REVISION.fullmatch(revision) or ".." in repository + revision:
        raise UserError(f"{pointer}: {repository!r} at {revision!r} is no name of a model on the hub.")
    cache = hub.kept(repository)
    check_model(cache / "snapshots" / revision, cache=cache)


# ---------------------------------------------------------------------------------------------- datasets


def check_dataset(path: Path) -> None:
    """Raise UserError, naming file, line and limit, unless every line of a JSONL file can be parsed in bounded memory
    and written again. What a row must hold is checked by `corpora.check_row`."""
    if path.suffix.lower() not in DATASETS:
        raise UserError(f"{path}: rows are read from JSON lines ({', '.join(DATASETS)}) only, no other format.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is not a regular file.")
    if path.stat().st_size > DATASET_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {DATASET_BYTES} of a dataset.")
    with path.open("rb") as handle:
        number = 0
        while line := handle.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {LINE_BYTES} bytes. Shorten or remove that row.")
            if number > ROWS:
                raise UserError(f"{path}, line {number}: more than {ROWS} rows. Split the file.")
            try:
                json.dumps(json.loads(line), ensure_ascii=False).encode()
            except RecursionError as error:
                raise UserError(f"{path}, line {number}: nested too deeply. Remove that row.") from error
            except UnicodeEncodeError as error:
                raise UserError(f"{path}, line {number}: half a character ({error.reason}). Mend that row.") from error
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                    continue  # `corpora.jsonl_rows` says which fault it is
                raise UserError(f"{path}, line {number}: {error}. Mend or remove that row.") from error


# --------------------------------------------------------------------------------------- artifacts, tables


def check_files(folder: Path, names: Iterable[Any], manifest: str) -> None:
    """Raise ValueError unless the names in a manifest stay in the folder and are all that it holds, links none."""
    expected = set()
    for name in names:
        if not inside(name):
            raise ValueError(f"the file name {name!r} leads out of the folder")
        expected.add(name)
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise ValueError(f"{path.name} is a link")
        if path.name.startswith(".") and not path.suffix:
            continue  # what file systems and browsers of files leave behind (.DS_Store, .nfs0001); nothing reads it
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in expected and name != manifest:
            raise ValueError(f"the file {name} is not in it")


def table_path(folder: Path, name: Any) -> Path:
    """Where a table that a record names lies. Raises UserError for a name that is more than a name, for a link, and for
    a table that would not fit into memory."""
    if not isinstance(name, str) or not TABLE.fullmatch(name):
        raise UserError(f"{folder / 'record.json'} names the table {name!r}, which is no plain name.")
    path = folder / f"{name}.parquet"
    if path.is_symlink():
        raise UserError(f"{path} is a link. Put the file itself there.")
    return path


def check_table(path: Path) -> None:
    """Raise UserError when a table cannot be read or is larger unpacked than is allowed; reads its footer only."""
    import pyarrow
    import pyarrow.parquet

    try:
        footer = pyarrow.parquet.read_metadata(path)
        unpacked = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if unpacked > TABLE_BYTES or footer.num_rows > TABLE_BYTES // 8:
        raise UserError(
            f"{path} has {footer.num_rows} rows and {unpacked} bytes unpacked, more than the {TABLE_BYTES} of a table."
        )
