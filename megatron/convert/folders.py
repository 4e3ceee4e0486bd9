"""Output folders that appear complete or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import ConfigurationError


def check_new(output: Path) -> None:
    """Check that the folder does not exist, since nothing is overwritten.

    Raises: ConfigurationError if it exists.
    """
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"--output {output}: exists already; name a new folder, or move this one away")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield `output`.partial to write into; it is renamed to `output` at the end and removed after an error.

    Raises: ConfigurationError if `output` exists or cannot be created; OSError if the disk is full.
    """
    check_new(output)
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"--output {output}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():  # safetensors creates files that only their owner can read
                path.chmod(partial.stat().st_mode & 0o666)
            _sync(path)
        check_new(output)
        partial.rename(output)
    except OSError as error:
        raise OSError(f"--output {output}: could not be written ({error}); free space and start again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def set_fields(file: Path, **fields) -> None:
    """Set fields of the object in a JSON file."""
    contents = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
