"""From chunks of text to tokens: what a worker process computes of a chunk, and how the results come in order.

1. The calling process reads the sources and sends chunks of undecoded records, a bounded number ahead.
2. A worker parses the records, encodes them, and returns the ids, sizes and digests of the documents of each output.
3. The calling process takes the results in the order of the chunks: the output is the same for any number of workers.
"""

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Thread
from time import sleep

import numpy as np

from megatron import stop_signals
from megatron.data.contamination import below, ngram_hashes
from megatron.data.corpus import split_of
from megatron.data.indexed import token_dtype
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.round_trip import RoundTrip
from megatron.data.sources.base import BadRecord, Chunk
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError

PARENT_CHECK_SECONDS = 1.0

MapInOrder = Callable[[Iterable["ChunkTask"]], Iterator["TokenisedChunk"]]


@dataclass
class Documents:
    """Documents of one output.

    ids: of all documents, in the dtype of the file; sizes: tokens of each, int32; digests: SHA-256 of each text.
    """

    ids: np.ndarray
    sizes: np.ndarray
    digests: bytes
    text_bytes: int
    round_trip: dict


@dataclass
class TokenisedChunk:
    """What a chunk gives: its documents by output, counts of what was skipped by reason, and n-grams.

    ngrams: hashes of train's; held_out: of each document of another split the CRC-32 and the hashes of its n-grams.
    """

    documents: dict[str, Documents]
    skipped: Counter
    ngrams: np.ndarray
    held_out: dict[str, list[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class ChunkTask:
    """A chunk to tokenise.

    N-grams of train above `largest_ngram` and those of held-out documents from `thresholds` on are not needed.
    """

    chunk: Chunk
    largest_ngram: int = 0
    thresholds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A document of one output: its text, the same in UTF-8, and the SHA-256 of that."""

    name: str
    text: str
    data: bytes
    digest: bytes


class ChunkTokeniser:
    """Tokenises chunks; without a tokenizer it only measures and hashes them. One in each worker process."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer | None):
        self._options, self._tokenizer = options, tokenizer
        self._end = [tokenizer.eod] if tokenizer and options.appends_eod else []

    @classmethod
    def from_file(cls, options: PreprocessOptions, path: Path) -> "ChunkTokeniser":
        """Return one with the tokenizer of the options, whose file is `path`."""
        return cls(options, options.build_tokenizer(path))

    def __call__(self, task: ChunkTask) -> TokenisedChunk:
        """Return the tokens of a chunk.

        Raises: BadRecord for the first bad record, unless --on-error is skip; ConfigurationError for a document that
            cannot be encoded.
        """
        skipped = Counter()
        texts: dict[str, list[Text]] = {name: [] for name in self._options.outputs}
        for output, text in self._texts(task.chunk, skipped):
            texts[output].append(text)
        documents = {output: self._tokenised(texts[output], skipped) for output in texts}
        train = [ngram_hashes(text.data) for text in texts["train"]] if task.thresholds else []
        return TokenisedChunk(
            documents=documents,
            skipped=skipped,
            ngrams=below(np.concatenate([np.empty(0, np.uint64), *train]), task.largest_ngram),
            held_out={
                output: [_held_out_ngrams(text.data, threshold) for text in texts[output]]
                for output, threshold in task.thresholds.items()
            },
        )

    def _texts(self, chunk: Chunk, skipped: Counter) -> Iterator[tuple[str, Text]]:
        """Yield (output, text) of each document."""
        options = self._options
        for record in chunk.records(options.json_keys):
            if isinstance(record, BadRecord):
                if options.on_error == "stop":
                    raise record
                skipped[record.reason] += 1
                continue
            for key, text in zip(options.json_keys, record.texts):
                if options.is_blank(text):
                    skipped["blank"] += 1
                    continue
                data = text.encode()
                digest = hashlib.sha256(data).digest()
                output = split_of(record.group, digest, options.splits) if options.has_splits else key
                yield output, Text(record.name, text, data, digest)

    def _tokenised(self, documents: list[Text], skipped: Counter) -> Documents:
        """Return the tokens of documents; those that cannot be encoded are removed from the list, or the first raises.

        Raises: BadRecord for a document that cannot be encoded, unless --on-error is skip.
        """
        try:
            return self._encoded(documents)
        except ConfigurationError:
            good = [document for document in documents if self._is_good(document, skipped)]
            documents[:] = good
            return self._encoded(documents)

    def _is_good(self, document: Text, skipped: Counter) -> bool:
        try:
            self._encoded([document])
        except ConfigurationError as error:
            if self._options.on_error == "stop":
                raise BadRecord(f"{error} (in {document.name})", "cannot be encoded") from None
            skipped["cannot be encoded"] += 1
            return False
        return True

    def _encoded(self, documents: list[Text]) -> Documents:
        """Return the tokens of the documents of one output, each with `eod` at its end if it is appended."""
        ids, sizes, round_trip = np.empty(0, np.uint16), np.empty(0, np.int32), {}
        if self._tokenizer is not None:
            texts = [document.text for document in documents]
            encoded = self._tokenizer.encode_arrays(texts)
            round_trip = self._round_trip(documents, encoded)
            sizes = np.fromiter((len(part) + len(self._end) for part in encoded), np.int32, len(encoded))
            ids = np.empty(int(sizes.sum()), token_dtype(self._tokenizer.vocabulary_size))
            start = 0
            for part, size in zip(encoded, sizes.tolist()):
                ids[start : start + len(part)] = part
                ids[start + len(part) : start + size] = self._end
                start += size
        return Documents(
            ids=ids,
            sizes=sizes,
            digests=b"".join(document.digest for document in documents),
            text_bytes=sum(len(document.data) for document in documents),
            round_trip=round_trip,
        )

    def _round_trip(self, documents: list[Text], encoded: list[np.ndarray]) -> dict:
        """Return the counts of the documents that decode to another text."""
        assert self._tokenizer is not None
        counts = RoundTrip(self._tokenizer.flag)
        if self._tokenizer.lossless is True:
            decoded = [document.text for document in documents]
        else:
            decoded = self._tokenizer.decode_batch([part.tolist() for part in encoded])
        for document, decoded_text in zip(documents, decoded, strict=True):
            counts.compare(document.name, document.text, decoded_text)
        return counts.summary()


def _held_out_ngrams(text: bytes, threshold: int) -> tuple[int, np.ndarray]:
    crc = zlib.crc32(text)
    return crc, ngram_hashes(text) if crc < threshold else np.empty(0, np.uint64)


@contextmanager
def in_order(workers: int, make: Callable[[], ChunkTokeniser]) -> Iterator[MapInOrder]:
    """Yield a function that tokenises chunks in order, in `workers` processes, or in this one if that is 1.

    `make` is called once in each process, and must be picklable.

    Raises: ConfigurationError for a worker that was killed.
    """
    if workers == 1:
        compute = make()
        yield lambda tasks: map(compute, tasks)
        return
    # a fresh interpreter: forking a process with threads can hang
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (make, os.getpid()))
    try:
        yield lambda tasks: _ahead(pool, tasks, 2 * workers + 2)
    except BrokenProcessPool:
        for worker in active_children():  # the pool sends SIGTERM, which they block, and waits for their end
            worker.kill()
        raise ConfigurationError(
            f"--workers {workers}: a worker process was killed, perhaps for lack of memory; lower it, and run the same "
            "command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # a worker that starts reads files that the caller removes after this


def _ahead(pool: ProcessPoolExecutor, tasks: Iterable[ChunkTask], most: int) -> Iterator[TokenisedChunk]:
    pending = deque()
    for task in tasks:
        with stop_signals.blocked():  # for the workers that start here: only this process ends them
            pending.append(pool.submit(_compute, task))
        if len(pending) >= most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: ChunkTokeniser | None = None


def _start_worker(make: Callable[[], ChunkTokeniser], parent: int) -> None:
    global _worker
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker = make()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, which a killed parent cannot ask for."""
    while os.getppid() == parent:
        sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _compute(task: ChunkTask) -> TokenisedChunk:
    assert _worker is not None
    return _worker(task)
