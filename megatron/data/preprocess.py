"""Preprocesses text into token files: a training split, a tuning split and a validation split.

The text is read once for its sizes and hash, once to train a tokenizer, and once to tokenise and write. Only a batch of
documents and samples of bounded size are in memory, so the text may be larger than RAM. Files are written to
OUTPUT_DIR/.partial and moved when all are complete, corpus.json last, which marks them as complete.
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron.data.contamination import HeldOut, ngram_hashes
from megatron.data.corpus import SPLITS, Document, Fingerprint, split_of
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, read_metadata
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.round_trip import RoundTrip
from megatron.data.tokenizer import Tokenizer, build_tokenizer, file_hash, train_tokenizer
from megatron.errors import ConfigurationError

BATCH_CHARACTERS = 1 << 21  # of a batch, tokenised on all cores
TOKENIZER_BYTES = 1 << 30  # a tokenizer is trained on at most this much text, a sample

logger = logging.getLogger(__name__)


def preprocess(options: PreprocessOptions) -> dict | None:
    """Write all splits and return the content of corpus.json; None if they are written already.

    Raises: ConfigurationError for unusable text or tokenizers, OSError if the files cannot be written.
    """
    text, held_out = survey(options)
    settings, folder = options.settings(text.hash), options.output_dir
    with _only_writer(folder):
        if _complete(folder, settings, options.tokenizer_file):
            return None
        stage = folder / ".partial"
        try:
            shutil.rmtree(stage, ignore_errors=True)  # left by a killed process
            stage.mkdir()
            tokenizer = _make_tokenizer(options, stage, text.sizes["train"]["bytes"])
            tokens, round_trips = _tokenise(options, stage, tokenizer, text=text, held_out=held_out)
            summary = _describe(
                options,
                stage,
                tokenizer=tokenizer,
                settings=settings,
                text=text,
                tokens=tokens,
                held_out=held_out,
                round_trips=round_trips,
            )
            _publish(stage, folder, options.source)
        except OSError as error:
            raise OSError(
                f"--output-dir {folder}: cannot be written ({error.strerror}); free space or name another"
            ) from None
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return summary


def survey(options: PreprocessOptions) -> tuple[Fingerprint, dict[str, HeldOut]]:
    """Read all text; return its sizes and hash, and the n-grams of the held-out splits to compare with train."""
    fingerprint = Fingerprint()
    held_out = {name: HeldOut() for name in options.written if name != "train" and "train" in options.written}
    with _bar("reading") as bar:
        for document in options.documents():
            name = split_of(document, options.splits)
            bar.update(fingerprint.add(name, document.text))
            if name in held_out:
                held_out[name].add(document.text)
    if not any(size["documents"] for size in fingerprint.sizes.values()):
        raise ConfigurationError(f"{options.named}: holds no text; give files that do")
    for name in options.written:
        if not fingerprint.sizes[name]["documents"]:
            raise ConfigurationError(
                f"--splits {options.shares}: the {name} split has no document; add some, change the proportions, "
                "or cut .txt files into documents with --txt-separator"
            )
    return fingerprint, held_out


def _make_tokenizer(options: PreprocessOptions, stage: Path, train_bytes: int) -> Tokenizer:
    """Return the tokenizer; its file is copied to or trained in `stage`."""
    path = stage / options.tokenizer_file
    if options.trained_ids:
        train_tokenizer(_training_texts(options, train_bytes), options.trained_ids, path)
    model = options.tokenizer_model or path
    tokenizer = build_tokenizer(
        options.tokenizer_type,
        model,
        vocab_size=options.vocab_size,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
    )
    if tokenizer.source is not None:
        path.write_bytes(tokenizer.source)  # so that training reads it next to the data, without a flag
    return tokenizer


def _training_texts(options: PreprocessOptions, train_bytes: int) -> Iterator[str]:
    """Yield the texts of the train split, or a sample of them by hash if there are more than TOKENIZER_BYTES."""
    threshold = (1 << 32) * TOKENIZER_BYTES / train_bytes
    with _bar("training the tokenizer", min(train_bytes, TOKENIZER_BYTES)) as bar:
        for document in options.documents():
            data = document.text.encode()
            if split_of(document, options.splits) == "train" and zlib.crc32(data) < threshold:
                bar.update(len(data))
                yield document.text


def _tokenise(
    options: PreprocessOptions, stage: Path, tokenizer: Tokenizer, *, text: Fingerprint, held_out: dict[str, HeldOut]
) -> tuple[dict[str, int], dict[str, RoundTrip]]:
    """Write all splits, each document with `eod` at its end; return the tokens and the round trip of each split.

    Raises: ConfigurationError if the text changed since the survey or a document cannot be encoded.
    """
    fingerprint = Fingerprint()
    tokens = dict.fromkeys(options.written, 0)
    round_trips = {name: RoundTrip(tokenizer.flag) for name in options.written}
    with ExitStack() as stack:
        bar = stack.enter_context(_bar("tokenising", sum(size["bytes"] for size in text.sizes.values())))
        writers = {
            name: stack.enter_context(IndexedDatasetWriter(stage / name, tokenizer.vocabulary_size))
            for name in options.written
        }
        for batch in _batches(options.documents()):
            train_ngrams = []
            texts = [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts)
            decoded = texts if tokenizer.lossless is True else tokenizer.decode_batch(encoded)
            for document, ids, decoded_text in zip(batch, encoded, decoded, strict=True):
                name = split_of(document, options.splits)
                round_trips[name].compare(document, decoded_text)
                writers[name].add_document([*ids, tokenizer.eod])
                tokens[name] += len(ids) + 1
                bar.update(fingerprint.add(name, document.text))
                if name == "train" and held_out:
                    train_ngrams.append(ngram_hashes(document.text))
            for split in held_out.values():
                split.compare(train_ngrams)
        if fingerprint.hash != text.hash:
            raise ConfigurationError(
                f"{options.named}: changed while it was read; start again when nothing writes to it"
            )
    return tokens, round_trips


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents of at least BATCH_CHARACTERS characters, except the last."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _describe(
    options: PreprocessOptions,
    stage: Path,
    *,
    tokenizer: Tokenizer,
    settings: dict,
    text: Fingerprint,
    tokens: dict[str, int],
    held_out: dict[str, HeldOut],
    round_trips: dict[str, RoundTrip],
) -> dict:
    """Write SPLIT.json of each split and corpus.json; return the latter."""
    path = stage / options.tokenizer_file
    origin = {
        "source": options.source,
        "python_version": platform.python_version(),
        "tokenizer_hash": file_hash(path) if path.exists() else None,
    }
    encoding = {
        "tokenizer_type": options.tokenizer_type,
        "tokenizer_model": path.name if path.exists() else None,
        "vocab_size": options.vocab_size,
        "vocabulary_size": tokenizer.vocabulary_size,
        "eod": tokenizer.eod,
        "corpus_hash": settings["hash"],
    }
    sizes = {name: {**text.sizes[name], "tokens": tokens[name]} for name in options.written}
    shared = {name: split.shared() for name, split in held_out.items()}
    changes = {name: round_trip.summary() for name, round_trip in round_trips.items()}
    for name, size in sizes.items():
        metadata = encoding | origin | size | {"round_trip": changes[name]}
        metadata |= {"shared_13grams": shared[name]} if name in shared else {}
        (stage / f"{name}.json").write_text(json.dumps(metadata, indent=1))
    summary = {"settings": settings, **origin, "splits": sizes, "round_trip": changes, "shared_13grams": shared}
    (stage / "corpus.json").write_text(json.dumps(summary, indent=1))
    return summary


def _publish(stage: Path, folder: Path, source: str | list[str]) -> None:
    """Move all files to `folder`; in between, no index and no corpus.json is there, so that a mixture is never valid.

    A split of an earlier call from the same text that this call does not write is removed, since its documents are now
    in other splits.
    """
    written = [path.name for path in stage.iterdir()]
    (folder / "corpus.json").unlink(missing_ok=True)
    for split in SPLITS:
        if f"{split}.idx" in written or read_metadata(folder / split).get("source") == source:
            (folder / f"{split}.idx").unlink(missing_ok=True)
            (folder / f"{split}.bin").unlink(missing_ok=True)
            (folder / f"{split}.json").unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: (name == "corpus.json", name.endswith(".idx"), name)):
        os.replace(stage / name, folder / name)


def _complete(folder: Path, settings: dict, tokenizer_file: str) -> bool:
    """Return whether the files of these settings exist and are complete."""
    try:
        record = json.loads((folder / "corpus.json").read_bytes())
        if record["settings"] != settings:
            return False
        for name, size in record["splits"].items():
            dataset = IndexedDataset(folder / name)
            corpus_hash = read_metadata(folder / name).get("corpus_hash")
            if (len(dataset), dataset.total_tokens) != (size["documents"], size["tokens"]):
                return False
            if corpus_hash != settings["hash"]:
                return False
        tokenizer = record["tokenizer_hash"]
        return tokenizer is None or file_hash(folder / tokenizer_file) == tokenizer
    except (OSError, ValueError, KeyError, TypeError):  # anything unreadable is written again
        return False


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Lock the folder, created if missing; wait while another process writes to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"--output-dir {folder}: cannot be created ({error.strerror}); name another") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process writes to it; waiting", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bar(description: str, total: int | None = None) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=None)  # None: only on a terminal
