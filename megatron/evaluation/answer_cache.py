"""Answers that outlive the command that found them, for --use_cache.

PATH_rankR.jsonl, one for each process, has a line for each document: the hash of all that decides its answers, and the
answers. So those of another checkpoint, setting or text are never found, and any number of processes goes on from what
others have kept. (lm-eval's own cache knows an answer by its text alone.)
"""

import hashlib
import json
from pathlib import Path

from megatron.training.run_folder import writing


class Kept:
    """What is kept under a path, or nothing without one; `settings` decide all answers of this model."""

    def __init__(self, path: str | None, rank: int, settings: dict):
        self._settings, self._answers, self._file = settings, {}, None
        if path is None:
            return
        place = Path(path)
        for file in place.parent.glob("*.jsonl"):
            if file.name.startswith(f"{place.name}_rank"):
                self._read(file)
        file = place.with_name(f"{place.name}_rank{rank}.jsonl")
        with writing(file):
            place.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "a", encoding="utf-8")

    def _read(self, file: Path) -> None:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                found = json.loads(line)
                self._answers[found["key"]] = found["answers"]
            except (ValueError, KeyError, TypeError):
                continue  # a kill has cut it short

    def key(self, *asked) -> str:
        """Return what the answers to `asked` are known by."""
        content = json.dumps([self._settings, *asked], sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> list | None:
        return self._answers.get(key)

    def add(self, key: str, answers: list) -> None:
        """Keep answers; they are on their way to the disk when this returns."""
        if self._file is None or key in self._answers:
            return
        self._answers[key] = answers
        with writing(Path(self._file.name)):
            # the line end comes first: what a kill left of a line must not swallow the next
            self._file.write("\n" + json.dumps({"key": key, "answers": answers}))
            self._file.flush()
