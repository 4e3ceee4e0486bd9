"""Unfinished token files: a folder with a lock, appended files, and a record of progress from which a run resumes.

STAGE/NAME.bin, NAME.sizes   ids and int32 sizes of the documents so far; after a kill they may be longer than recorded
STAGE/progress.json          position in the sources, lengths of the files, counts; replaced as a whole
STAGE/progress-N.npz         arrays that belong to it
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from megatron.data.index_file import write_index
from megatron.data.tokenise import Documents
from megatron.errors import ConfigurationError

logger = logging.getLogger(__name__)


@contextmanager
def only_writer(stage: Path, named: str) -> Iterator[None]:
    """Create `stage` and lock it; wait while another process has the lock. Messages start with `named`.

    Raises: ConfigurationError if it cannot be created.
    """
    while True:
        try:
            stage.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(stage, os.O_RDONLY)
        except OSError as error:
            raise ConfigurationError(f"{named}: cannot be created ({error.strerror}); name another") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another process writes to it; waiting", named)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(stage, descriptor):  # else the other process removed it when it had finished
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def clear(stage: Path) -> None:
    """Remove what is in the folder; the folder itself is the lock."""
    for path in stage.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_progress(stage: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """Return the last progress and its arrays; None if there is none, or its files are not all there."""
    try:
        progress = json.loads((stage / "progress.json").read_bytes())
        if any((stage / name).stat().st_size < size for name, size in progress["files"].items()):
            return None
        with np.load(stage / progress["arrays"], allow_pickle=False) as arrays:
            return progress, dict(arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile):
        return None


def write_progress(stage: Path, progress: dict, arrays: dict[str, np.ndarray]) -> None:
    """Replace the record of progress; files that were appended to must be on the disk already."""
    last = [path.name for path in stage.glob("progress-*.npz")]
    number = 1 + max((int(name.removeprefix("progress-").removesuffix(".npz")) for name in last), default=0)
    name = f"progress-{number}.npz"
    with open(stage / name, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        _to_disk(file)
    with open(stage / "progress.json.new", "w") as file:
        json.dump(progress | {"arrays": name}, file)
        _to_disk(file)
    os.replace(stage / "progress.json.new", stage / "progress.json")
    for old in last:
        (stage / old).unlink()


class StagedOutputs:
    """The token files of all outputs in a stage; a context manager."""

    def __init__(self, stage: Path, names: dict[str, str], dtype: np.dtype, lengths: dict[str, tuple[int, int]]):
        """Open the files `names` of the outputs, cut to their recorded `lengths`: documents and tokens."""
        self._stage, self._dtype, self._names, self._files = stage, dtype, names, ExitStack()
        self.lengths = {output: lengths.get(output, (0, 0)) for output in names}
        self._ids, self._sizes = {}, {}
        for output, (documents, tokens) in self.lengths.items():
            self._ids[output] = self._open(f"{names[output]}.bin", tokens * dtype.itemsize)
            self._sizes[output] = self._open(f"{names[output]}.sizes", documents * 4)

    def __enter__(self) -> "StagedOutputs":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._files.close()

    def add(self, output: str, documents: Documents) -> None:
        """Append documents to an output."""
        self._ids[output].write(documents.ids)
        self._sizes[output].write(documents.sizes)
        number, tokens = self.lengths[output]
        self.lengths[output] = number + len(documents.sizes), tokens + len(documents.ids)

    def to_disk(self) -> dict[str, int]:
        """Return the length of each file when everything is on the disk."""
        files = (*self._ids.values(), *self._sizes.values())
        for file in files:
            _to_disk(file)
        return {Path(file.name).name: file.tell() for file in files}

    def finish(self) -> None:
        """Write the index of each output."""
        self._files.close()
        for output, (documents, _) in self.lengths.items():
            name = self._names[output]
            sizes = np.memmap(self._stage / f"{name}.sizes", np.int32, "r") if documents else np.empty(0, np.int32)
            write_index(self._stage / f"{name}.idx", self._dtype, sizes)

    def _open(self, name: str, length: int):
        file = self._files.enter_context((self._stage / name).open("ab"))
        file.truncate(length)
        file.seek(length)  # `tell` would return the old end until something is written
        return file


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
