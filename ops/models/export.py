"""`fedmq models export`: a version as a file that inference can load."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ops.models.facts import Facts, facts_of
from ops.models.formats import FORMATS, ONNX, SAFETENSORS
from ops.models.lookup import entry_of, image_of, number_of, opened
from shared.config import EvaluatorSettings
from shared.errors import SettingsError
from shared.layout import Layout
from shared.sync import sync_folder
from worker.task import Task

BLOCK_BYTES = 2**20


def export(settings: EvaluatorSettings, name: str, out: Path, force: bool, with_metadata: bool) -> None:
    """Write a version as the file that its suffix names; it appears whole or not at all.

    Args:
        settings: job, store, and for ONNX the task.
        name: a version, a tag, or newest.
        out: the file: .safetensors, byte for byte what the store holds; .pt, a torch state_dict; .onnx; .npz.
        force: replace a file that is there.
        with_metadata: also write OUT.json: job, version, metrics, tags, hashes.

    Raises:
        SettingsError: there is no such version or format, the file exists or cannot be written, or the task does not
            fit.
    """
    suffix = out.suffix.lower() or SAFETENSORS
    if suffix not in FORMATS:
        raise SettingsError(f"{out}: no format {suffix!r}; the suffix must be one of {', '.join(FORMATS)}")
    _check_free(out, force)
    beside = out.with_name(f"{out.name}.json")
    if with_metadata:
        _check_free(beside, force)
    task = Task.load(settings.task, needs=("build", "example_input")) if suffix == ONNX else None
    store = opened(settings)
    version = number_of(store, name)
    facts = facts_of(store, entry_of(store, version))
    image = image_of(store, version)
    size_bytes, sha256 = _write(out, lambda file: FORMATS[suffix](file, image, task), force)
    print(f"wrote version {version} of job {settings.job} to {out}: {size_bytes:,} bytes, sha256 {sha256}")
    if with_metadata:
        text = json.dumps(_metadata(settings.job, facts, image.layout, suffix, sha256), indent=2) + "\n"
        _write(beside, lambda file: _text(file, text), force)
        print(f"wrote what is known of it to {beside}")


def _metadata(job: str, facts: Facts, layout: Layout, suffix: str, sha256: str) -> dict[str, object]:
    own = {"job": job, "format": suffix.removeprefix("."), "file_sha256": sha256, "layout": layout.hash}
    return own | facts.record() | {"num_params": layout.num_params}


def _text(file: IO[bytes], text: str) -> None:
    file.write(text.encode())


def _check_free(path: Path, force: bool) -> None:
    """Refuse to write over a file unless told to.

    Raises:
        SettingsError: it exists, or is a folder.
    """
    if path.is_dir():
        raise SettingsError(f"cannot write {path}: it is a folder")
    if path.exists() and not force:
        raise SettingsError(f"{path} exists: choose another name, or say --force to replace it")


def _write(path: Path, write: Callable[[IO[bytes]], None], force: bool) -> tuple[int, str]:
    """Write a file under another name, then put it in its place; return its size and sha256.

    Raises:
        SettingsError: it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        size_bytes, sha256 = temporary.stat().st_size, _sha256(temporary)
        _check_free(path, force)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)
    return size_bytes, sha256


def _remove(path: Path) -> None:
    with contextlib.suppress(NotADirectoryError):  # a file stands where its folder should
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
