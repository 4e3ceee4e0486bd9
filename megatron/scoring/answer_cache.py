"""Scores and generated texts that outlive a command, for --use_cache.

PATH_rankR.jsonl, one file per rank, has one line per document: a hash of everything that determines its answers, and
the answers. Answers of another checkpoint, setting or text therefore never match, and a command resumes on any number
of ranks from what others have written. (lm-eval's own cache is keyed by the text alone.)
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron.training.run_folder import writing


def cache_files(path: str) -> list[Path]:
    """Return the files of all ranks under a path."""
    prefix = Path(path)
    return [file for file in prefix.parent.glob("*.jsonl") if file.name.startswith(f"{prefix.name}_rank")]


class AnswerCache:
    """Answers under a path, or an empty cache that stores nothing where the path is None.

    `settings` is everything that determines the answers of this model, apart from the request.
    """

    def __init__(self, path: str | None, rank: int, settings: dict):
        self._settings = settings
        self._answers: dict[str, list] = {}
        self._file = None
        if path is None:
            return
        prefix = Path(path)
        for file in cache_files(path):
            self._read(file)
        file = prefix.with_name(f"{prefix.name}_rank{rank}.jsonl")
        with writing(file):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the cache

    def _read(self, file: Path) -> None:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answers"]
            except (ValueError, KeyError, TypeError):
                continue  # truncated by a kill

    def key(self, *content: Any) -> str:
        """Return the cache key of some content under this model and its settings."""
        text = json.dumps([self._settings, *content], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> list | None:
        """Return the cached answers, or None."""
        return self._answers.get(key)

    def add(self, key: str, answers: list) -> None:
        """Store answers; they are flushed to the operating system when this returns."""
        if self._file is None or key in self._answers:
            return
        self._answers[key] = answers
        with writing(Path(self._file.name)):
            # the newline comes first, so that a line truncated by a kill does not swallow the next one
            self._file.write("\n" + json.dumps({"key": key, "answers": answers}))
            self._file.flush()
