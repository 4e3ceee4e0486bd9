"""Preprocesses text into token files: train, tuning and validation splits, or one data set for each key.

1. If a tokenizer has to be trained, the text is read once for its sizes and hash, and once to train it.
2. Text is read, tokenised in worker processes, and appended to files in a hidden folder next to the output. Its hash
   and its contamination are computed in the same pass. From time to time the progress is recorded.
3. When all files are complete they are moved to their names, corpus.json last, which marks them as complete.

A run that was interrupted resumes from its last recorded progress, with the same result. Only a few chunks of text and
samples of bounded size are in memory, so the text may be larger than RAM.
"""

import json
import logging
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic

import numpy as np
from tqdm import tqdm

from megatron.data.contamination import HeldOut, TrainNgrams
from megatron.data.corpus import Fingerprint, corpus_hash, split_of_text
from megatron.data.indexed import token_dtype
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.publish import Written, check_targets, has_record, is_complete, publish
from megatron.data.round_trip import RoundTrip
from megatron.data.sources.base import BadRecord, Position, Source, read_chunks, read_records
from megatron.data.staging import StagedOutputs, clear, only_writer, read_progress, write_progress
from megatron.data.tokenise import ChunkTask, ChunkTokeniser, TokenisedChunk, in_order
from megatron.data.tokenizer import train_tokenizer
from megatron.errors import ConfigurationError

TOKENIZER_BYTES = 1 << 30  # a tokenizer is trained on at most this much text, a sample
RECORD_SECONDS = 5.0  # at least, between two records of progress
RECORD_SHARE = 20  # recording takes at most one part in this many of the time
QUIET_SECONDS = 60  # between two lines of progress where standard error is no terminal

logger = logging.getLogger(__name__)


def preprocess(options: PreprocessOptions) -> dict | None:
    """Write all data sets and return the content of corpus.json; None if they are written already.

    Raises: ConfigurationError for unusable text or tokenizers, OSError if the files cannot be written.
    """
    sources = options.sources()
    check_targets(options, sources)
    try:
        with only_writer(options.stage, options.target):
            try:
                return _Preprocessing(options, sources).run()
            finally:
                if not is_resumable(options.stage):
                    clear(options.stage)
                    options.stage.rmdir()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{options.target}: cannot be written ({reason}); free space or name another") from None


def is_resumable(stage: Path) -> bool:
    """Return whether a run was interrupted after its progress was recorded."""
    return read_progress(stage) is not None


def resume_note(options: PreprocessOptions | None, error: Exception | None = None) -> str:
    """Return the end of a message: where progress is recorded from which the command resumes; "" if it is nowhere."""
    if options is None or not is_resumable(options.stage):
        return ""
    try:
        if not _Preprocessing(options, options.sources()).has_progress:
            return ""
    except (ConfigurationError, OSError):
        return ""
    stops_again = isinstance(error, BadRecord) and options.on_error == "stop"
    command = f"the same command{' with --on-error skip' if stops_again else ''}"
    return f"; progress is recorded in {options.stage}, and {command} resumes there"


class _Preprocessing:
    """One run: the text that was tokenised so far, and the position after it."""

    def __init__(self, options: PreprocessOptions, sources: list[Source]):
        self._options, self._sources, self._stage = options, sources, options.stage
        self._workers = options.worker_processes(sources)
        identities = [source.identity for source in sources]  # None for a stream, which is read once
        if options.reads_stream and options.trained_ids:
            raise ConfigurationError(
                f"{options.named}: is read once, and training a tokenizer reads the text before; give "
                "--tokenizer-model or another --tokenizer-type"
            )
        identity = {"format": 1, "settings": options.settings(None), "text": options.reading, "sources": identities}
        self._identity = None if None in identities else json.loads(json.dumps(identity))
        self._position: Position = (0, 0)
        self._read_bytes = 0  # of the sources, up to the position
        self._lengths: dict[str, tuple[int, int]] = {}  # documents and tokens of each output
        self._surveyed_hash: str | None = None  # of the text when it was read before, if it was
        self._fingerprints = {name: Fingerprint() for name in options.outputs}
        self._skipped: Counter[str] = Counter()
        self._train_ngrams = TrainNgrams()
        compares = options.has_splits and "train" in options.outputs
        self._held_out = {name: HeldOut() for name in options.outputs if compares and name != "train"}

    @property
    def has_progress(self) -> bool:
        """Whether progress of a run of the same settings and sources is recorded."""
        return self._read_progress() is not None

    def run(self) -> dict | None:
        """Return the content of corpus.json, None if everything is written already."""
        options, recorded = self._options, self._read_progress()
        if recorded is None:
            if is_resumable(self._stage):
                logger.info("%s: starts again, as the interrupted run had other text or flags", options.target)
            clear(self._stage)
            may_be_complete = not options.reads_stream and has_record(options)
            if options.trained_ids or may_be_complete:
                train_bytes = self._survey()
                if may_be_complete and is_complete(options, self._surveyed_hash):
                    return None
                if options.trained_ids:
                    texts = self._training_texts(train_bytes)
                    train_tokenizer(texts, options.trained_ids, self._tokenizer_path)
                else:
                    self._surveyed_hash = None  # it includes documents that the tokenizer cannot encode
        tokenizer = options.build_tokenizer(self._tokenizer_path)
        self._round_trips = {name: RoundTrip(tokenizer.flag) for name in options.outputs}
        if recorded is not None:
            self._restore(*recorded)
        self._tokenise(token_dtype(tokenizer.vocabulary_size))
        written = Written(
            fingerprints=self._fingerprints,
            tokens={name: tokens for name, (_, tokens) in self._lengths.items()},
            round_trips={name: counts.summary() for name, counts in self._round_trips.items()},
            shared={name: held_out.shared(self._train_ngrams) for name, held_out in self._held_out.items()},
            skipped=dict(sorted(self._skipped.items())),
        )
        return publish(options, tokenizer, written)

    @property
    def _tokenizer_path(self) -> Path:
        return self._stage / self._options.tokenizer_file

    def _survey(self) -> int:
        """Read all text for its hash; return the bytes to train a tokenizer on."""
        fingerprints, skipped = {name: Fingerprint() for name in self._options.outputs}, Counter()
        for result in self._map("reading", partial(ChunkTokeniser, self._options, None), {}):
            for name, documents in result.documents.items():
                fingerprints[name].add(documents.digests, documents.text_bytes)
            skipped.update(result.skipped)
        self._check_documents(fingerprints, skipped)
        self._surveyed_hash, self._position, self._read_bytes = corpus_hash(fingerprints), (0, 0), 0
        return sum(fingerprints[name].text_bytes for name in self._training_outputs)

    def _training_texts(self, train_bytes: int) -> Iterator[str]:
        """Yield the texts to train a tokenizer on; a sample of them by hash if there are more than TOKENIZER_BYTES."""
        options = self._options
        threshold = (1 << 32) * TOKENIZER_BYTES / max(1, train_bytes)
        with _bar("training the tokenizer", min(train_bytes, TOKENIZER_BYTES)) as bar:
            for record in read_records(self._sources, options.json_keys):
                for data in (text.encode() for text in record.texts if not options.is_blank(text)):
                    trains = not options.has_splits or split_of_text(record.group, data, options.splits) == "train"
                    if trains and zlib.crc32(data) < threshold:
                        bar.update(len(data))
                        yield data.decode()

    @property
    def _training_outputs(self) -> list[str]:
        return ["train"] if self._options.has_splits else [*self._options.outputs]

    def _tokenise(self, dtype: np.dtype) -> None:
        """Write the tokens of the text from the position on.

        Raises: ConfigurationError if the text changed since it was read before, a record is bad, or a document cannot
            be encoded.
        """
        recorded = monotonic()
        make = partial(ChunkTokeniser.from_file, self._options, self._tokenizer_path)
        with StagedOutputs(self._stage, self._options.outputs, dtype, self._lengths) as outputs:
            for result in self._map("tokenising", make, self._held_out):
                self._add(result, outputs)
                if monotonic() > recorded + RECORD_SECONDS and self._identity:
                    seconds = self._record(outputs)
                    recorded = monotonic() + seconds * RECORD_SHARE
            self._check_documents(self._fingerprints, self._skipped)
            if self._surveyed_hash not in (None, corpus_hash(self._fingerprints)):
                raise ConfigurationError(
                    f"{self._options.named}: changed while it was read; start again when nothing writes to it"
                )
            outputs.finish()
            self._lengths = outputs.lengths

    def _map(
        self, description: str, make: Callable[[], ChunkTokeniser], held_out: dict[str, HeldOut]
    ) -> Iterator[TokenisedChunk]:
        """Yield the result of every chunk from the position on, in order, and move the position.

        The n-grams of the outputs `held_out`, and of train, are part of the results.
        """
        ahead: deque[tuple[Position, int]] = deque()  # of the chunks whose results are not yet yielded

        def tasks() -> Iterator[ChunkTask]:
            for position, chunk in read_chunks(self._sources, self._options.json_keys, self._position):
                ahead.append((position, chunk.size))
                thresholds = {name: sample.threshold for name, sample in held_out.items()}
                yield ChunkTask(chunk, self._train_ngrams.largest, thresholds)

        sizes = [source.size for source in self._sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        with _bar(description, total, self._read_bytes) as bar, in_order(self._workers, make) as map_in_order:
            for result in map_in_order(tasks()):
                self._position, size = ahead.popleft()
                self._read_bytes += size
                bar.update(size)
                yield result

    def _add(self, result: TokenisedChunk, outputs: StagedOutputs) -> None:
        """Add the result of a chunk."""
        for name, documents in result.documents.items():
            outputs.add(name, documents)
            self._fingerprints[name].add(documents.digests, documents.text_bytes)
            self._round_trips[name].merge(documents.round_trip)
        self._skipped.update(result.skipped)
        self._train_ngrams.add(result.ngrams)
        for name, held_out in result.held_out.items():
            for crc, hashes in held_out:
                self._held_out[name].add(crc, hashes)

    def _check_documents(self, fingerprints: dict[str, Fingerprint], skipped: Counter) -> None:
        """Check that every data set has a document; the message counts what was skipped."""
        options = self._options
        if not any(fingerprint.documents for fingerprint in fingerprints.values()):
            counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
            note = f" (skipped: {counts})" if counts else ""
            raise ConfigurationError(f"{options.named}: holds no text{note}; give files that do")
        for name, fingerprint in fingerprints.items():
            if not fingerprint.documents and options.has_splits:
                raise ConfigurationError(
                    f"--splits {options.shares}: the {name} split has no document; add some, change the proportions, "
                    "or cut plain text files into documents with --txt-separator"
                )
            if not fingerprint.documents:
                raise ConfigurationError(f"--json-keys {name}: is empty in every document; leave it out")

    def _record(self, outputs: StagedOutputs) -> float:
        """Record the progress; return the seconds that this took."""
        start = monotonic()
        files = outputs.to_disk()
        progress = {
            "identity": self._identity,
            "on_error": self._options.on_error,
            "files": files,
            "read_bytes": self._read_bytes,
            "position": self._position,
            "lengths": outputs.lengths,
            "surveyed_hash": self._surveyed_hash,
            "fingerprints": {name: fingerprint.state() for name, fingerprint in self._fingerprints.items()},
            "skipped": self._skipped,
            "round_trips": {name: counts.summary() for name, counts in self._round_trips.items()},
        }
        states = {"train": self._train_ngrams.state()} | {name: held.state() for name, held in self._held_out.items()}
        arrays = {f"{name}/{key}": array for name, state in states.items() for key, array in state.items()}
        write_progress(self._stage, progress, arrays)
        return monotonic() - start

    def _read_progress(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """Return the progress of an interrupted run of the same settings and sources, None if there is none."""
        recorded = read_progress(self._stage)
        if not recorded or not self._identity or recorded[0]["identity"] != self._identity:
            return None
        # a run that stopped at a bad record may go on without it, but one that skipped records cannot undo that
        return recorded if recorded[0]["on_error"] in ("stop", self._options.on_error) else None

    def _restore(self, progress: dict, arrays: dict[str, np.ndarray]) -> None:
        """Continue from a recorded progress."""
        states: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            output, _, key = name.partition("/")
            states.setdefault(output, {})[key] = array
        self._position, self._read_bytes = tuple(progress["position"]), progress["read_bytes"]
        self._lengths = {name: (documents, tokens) for name, (documents, tokens) in progress["lengths"].items()}
        self._surveyed_hash = progress["surveyed_hash"]
        self._fingerprints = {name: Fingerprint(**state) for name, state in progress["fingerprints"].items()}
        self._skipped = Counter(progress["skipped"])
        for name, summary in progress["round_trips"].items():
            self._round_trips[name].merge(summary)
        self._train_ngrams = TrainNgrams.restored(states["train"])
        self._held_out = {name: HeldOut.restored(states[name]) for name in self._held_out}
        done = sum(fingerprint.text_bytes for fingerprint in self._fingerprints.values())
        logger.info("%s: resumes after %d MB of text", self._options.target, done // 10**6)


def _bar(description: str, total: int | None, initial: int = 0) -> tqdm:
    """Return a progress bar of bytes; where standard error is no terminal, a line a minute."""
    interval = 0.1 if sys.stderr.isatty() else QUIET_SECONDS
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        delay=0 if sys.stderr.isatty() else interval,
    )
