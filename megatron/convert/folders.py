"""Folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import ConfigurationError


def check_new(output: Path) -> None:
    """Refuse a folder that exists: nothing is ever written over."""
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"--output {output}: exists already; name a new folder, or move this one away")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` to write into; it bears that name when all is written, and goes where not.

    Raises ConfigurationError where `output` exists or cannot be made, and OSError where the disk is full.
    """
    check_new(output)
    aside = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier start that was killed
        aside.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"--output {output}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            if path.is_file():  # safetensors makes files that their owner alone may read
                path.chmod(aside.stat().st_mode & 0o666)
            _to_disk(path)
        check_new(output)
        aside.rename(output)
    except OSError as error:
        raise OSError(f"--output {output}: could not be written ({error}); free space and start again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def set_fields(file: Path, **fields) -> None:
    """Set fields of the object in a JSON file."""
    written = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
