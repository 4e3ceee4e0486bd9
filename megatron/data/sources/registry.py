"""From the values of --input to sources: files, folders, patterns and standard input, by suffix."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from megatron.config.flags import require
from megatron.data.compressed import SUFFIXES
from megatron.data.sources.base import Source
from megatron.data.sources.json_lines import STANDARD_INPUT, JsonLines
from megatron.data.sources.plain_text import PlainText
from megatron.data.sources.tables import ArrowFile, ParquetFile
from megatron.data.text_files import text_kind
from megatron.errors import ConfigurationError

JSON_KINDS = (".jsonl", ".ndjson", ".json")
TABLES = {".parquet": ParquetFile, ".arrow": ArrowFile}
# in a folder, where a .json file is rather metadata
FOLDER_KINDS = (".txt", ".jsonl", ".ndjson", *TABLES)


def list_sources(inputs: Sequence[str], *, txt: bool = False, separator: str | None = None) -> list[Source]:
    """Return a source for each file that --input names, in order; those of a folder or pattern are sorted.

    With `txt` every file is plain text, whatever its suffix, except tables.

    Raises: ConfigurationError for what names no file, twice the same file, or a file of an unknown kind, and for a
    `separator` without plain text.
    """
    sources: list[Source] = []
    seen = set()
    for word in inputs:
        if word == STANDARD_INPUT:
            if len(inputs) > 1:
                raise ConfigurationError("--input -: is standard input, and other inputs are given too; leave one out")
            sources.append(JsonLines(STANDARD_INPUT, None, None))
            continue
        # a file of two names is read once
        files = {os.path.realpath(path): path for path in reversed(_files(word, txt))}
        for real in sorted(files.keys() & seen):
            raise ConfigurationError(f"--input {word}: names {files[real]} a second time; leave one out")
        seen |= files.keys()
        sources += [_source(path, txt, separator) for path in reversed(files.values())]
    has_text = any(isinstance(source, PlainText) for source in sources)
    require(separator is None or has_text, "txt_separator", separator, "no file of --input is plain text; leave it out")
    return sources


def _files(word: str, txt: bool) -> list[str]:
    """Return the files that a value of --input names."""
    if os.path.isdir(word):
        paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(word) for name in names)
        visible = [
            path for path in paths if not any(part.startswith(".") for part in Path(path).relative_to(word).parts)
        ]
        files = [path for path in visible if txt or text_kind(Path(path)) in FOLDER_KINDS]
        wanted = "no file" if txt else f"no file of the kinds {', '.join(FOLDER_KINDS)}"
        remedy = "name its files" if txt else "name its files, or read every file as plain text with --txt"
    else:
        if os.path.exists(word) or not glob.has_magic(word):
            return [word]
        files = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        wanted, remedy = "no file matches", "check the pattern"
    if not files:
        raise ConfigurationError(f"--input {word}: {wanted}; {remedy}")
    return files


def _source(path: str, txt: bool, separator: str | None) -> Source:
    if not os.path.isfile(path):
        raise ConfigurationError(f"--input {path}: no such file; give the path of a file, a folder or a pattern")
    status = os.stat(path)
    identity = (path, status.st_size, status.st_mtime_ns)
    kind = text_kind(Path(path))
    if txt or kind == ".txt":
        return PlainText(path, status.st_size, identity, separator=separator)
    if kind in JSON_KINDS:
        return JsonLines(path, status.st_size, identity)
    if Path(path).suffix.lower() in TABLES:
        return TABLES[Path(path).suffix.lower()](path, status.st_size, identity)
    raise ConfigurationError(
        f"--input {path}: is none of .txt, {', '.join(JSON_KINDS)} (also as {', '.join(SUFFIXES)}), "
        f"{' and '.join(TABLES)}; rename it, or read it as plain text with --txt"
    )
