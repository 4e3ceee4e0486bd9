"""From text to token files: read once to measure, once to train a tokenizer, once to tokenise and write.

Nothing is held but a batch of documents and samples of bounded size, so the text may be larger than the memory.
Files are written aside, in OUTPUT_DIR/.partial, and moved into place when all are complete; corpus.json, which
says that they are, comes last.
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

from megatron.data.contamination import HeldOut, run_hashes
from megatron.data.corpus import SPLITS, Document, Fingerprint, split_of
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, read_metadata
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.round_trip import RoundTrip
from megatron.data.tokenizer import Tokenizer, build_tokenizer, file_hash, train_tokenizer
from megatron.errors import ConfigurationError

BATCH_CHARACTERS = 1 << 21  # tokenised together, on all cores
TOKENIZER_BYTES = 1 << 30  # a tokenizer learns from a sample of this size where there is more text

logger = logging.getLogger(__name__)


def preprocess(asked: PreprocessOptions) -> dict | None:
    """Write all splits and return what corpus.json says of them; None if they are there already."""
    text, held_out = survey(asked)
    settings, folder = asked.settings(text.hash), asked.output_dir
    with _only_writer(folder):
        if _complete(folder, settings, asked.tokenizer_file):
            return None
        stage = folder / ".partial"
        try:
            shutil.rmtree(stage, ignore_errors=True)  # of a writer that was killed
            stage.mkdir()
            tokenizer = _make_tokenizer(asked, stage, text.sizes["train"]["bytes"])
            tokens, round_trips = _tokenise(asked, stage, tokenizer, text, held_out)
            summary = _describe(asked, stage, tokenizer, settings, text, tokens, held_out, round_trips)
            _publish(stage, folder, asked.source)
        except OSError as error:
            raise OSError(
                f"--output-dir {folder}: cannot be written ({error.strerror}); free space or name another"
            ) from None
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return summary


def survey(asked: PreprocessOptions) -> tuple[Fingerprint, dict[str, HeldOut]]:
    """Read everything once: sizes and hash, and the held-out splits' word runs to be looked for in train."""
    found = Fingerprint()
    held_out = {name: HeldOut() for name in asked.written if name != "train" and "train" in asked.written}
    with _bar("reading") as bar:
        for document in asked.documents():
            name = split_of(document, asked.splits)
            bar.update(found.add(name, document.text))
            if name in held_out:
                held_out[name].add(document.text)
    if not any(size["documents"] for size in found.sizes.values()):
        raise ConfigurationError(f"{asked.named}: holds no text; give files that do")
    for name in asked.written:
        if not found.sizes[name]["documents"]:
            raise ConfigurationError(
                f"--splits {asked.shares}: the {name} split holds no document; add some, change the shares, "
                "or cut .txt files into documents with --txt-separator"
            )
    return found, held_out


def _make_tokenizer(asked: PreprocessOptions, stage: Path, train_bytes: int) -> Tokenizer:
    """Return the tokenizer, its file copied or trained into `stage`."""
    path = stage / asked.tokenizer_file
    if asked.trained_ids:
        train_tokenizer(_training_texts(asked, train_bytes), asked.trained_ids, path)
    model = asked.tokenizer_model or path
    tokenizer = build_tokenizer(asked.tokenizer_type, model, asked.vocab_size, asked.vocab_file, asked.merge_file)
    if tokenizer.source is not None:
        path.write_bytes(tokenizer.source)  # so that training finds it next to the data, without a flag
    return tokenizer


def _training_texts(asked: PreprocessOptions, train_bytes: int) -> Iterator[str]:
    """Yield the texts of the train split, or of those that their hash samples where there are too many."""
    threshold = (1 << 32) * TOKENIZER_BYTES / train_bytes
    with _bar("training the tokenizer", min(train_bytes, TOKENIZER_BYTES)) as bar:
        for document in asked.documents():
            data = document.text.encode()
            if split_of(document, asked.splits) == "train" and zlib.crc32(data) < threshold:
                bar.update(len(data))
                yield document.text


def _tokenise(
    asked: PreprocessOptions, stage: Path, tokenizer: Tokenizer, text: Fingerprint, held_out: dict[str, HeldOut]
) -> tuple[dict[str, int], dict[str, RoundTrip]]:
    """Write all splits at once, each document ended by `eod`; return the tokens of each and what they do not give back.

    Raises: ConfigurationError.
    """
    again, tokens = Fingerprint(), dict.fromkeys(asked.written, 0)
    round_trips = {name: RoundTrip(tokenizer.named) for name in asked.written}
    with ExitStack() as stack:
        bar = stack.enter_context(_bar("tokenising", sum(size["bytes"] for size in text.sizes.values())))
        writers = {
            name: stack.enter_context(IndexedDatasetWriter(stage / name, tokenizer.vocabulary_size))
            for name in asked.written
        }
        for batch in _batches(asked.documents()):
            runs, texts = [], [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts)
            decoded = texts if tokenizer.lossless else tokenizer.decode_batch(encoded)
            for document, ids, decoded_text in zip(batch, encoded, decoded, strict=True):
                name = split_of(document, asked.splits)
                round_trips[name].compare(document, decoded_text)
                writers[name].add_document([*ids, tokenizer.eod])
                tokens[name] += len(ids) + 1
                bar.update(again.add(name, document.text))
                if name == "train" and held_out:
                    runs.append(run_hashes(document.text))
            for held in held_out.values():
                held.compare(runs)
        if again.hash != text.hash:
            raise ConfigurationError(f"{asked.named}: changed while it was read; start again when it is still")
    return tokens, round_trips


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
    asked: PreprocessOptions,
    stage: Path,
    tokenizer: Tokenizer,
    settings: dict,
    text: Fingerprint,
    tokens: dict[str, int],
    held_out: dict[str, HeldOut],
    round_trips: dict[str, RoundTrip],
) -> dict:
    """Write SPLIT.json beside each split and corpus.json; return the latter."""
    path = stage / asked.tokenizer_file
    origin = {
        "source": asked.source,
        "python_version": platform.python_version(),
        "tokenizer_hash": file_hash(path) if path.exists() else None,
    }
    made = {
        "tokenizer_type": asked.tokenizer_type,
        "tokenizer_model": path.name if path.exists() else None,
        "vocab_size": asked.vocab_size,
        "vocabulary_size": tokenizer.vocabulary_size,
        "eod": tokenizer.eod,
        "corpus_hash": settings["hash"],
    }
    sizes = {name: {**text.sizes[name], "tokens": tokens[name]} for name in asked.written}
    shared = {name: held.shared() for name, held in held_out.items()}
    changes = {name: round_trip.summary() for name, round_trip in round_trips.items()}
    for name, size in sizes.items():
        metadata = made | origin | size | {"round_trip": changes[name]}
        metadata |= {"shared_13grams": shared[name]} if name in shared else {}
        (stage / f"{name}.json").write_text(json.dumps(metadata, indent=1))
    summary = {"settings": settings, **origin, "splits": sizes, "round_trip": changes, "shared_13grams": shared}
    (stage / "corpus.json").write_text(json.dumps(summary, indent=1))
    return summary


def _publish(stage: Path, folder: Path, source: str | list[str]) -> None:
    """Move all files into place. Between the first and the last, no index and no corpus.json vouch for a mixture.

    A split that an earlier call wrote from the same text, and this one does not write, goes: its documents now
    stand in another split.
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
    """Return whether the files of these settings are all there, and whole."""
    try:
        record = json.loads((folder / "corpus.json").read_bytes())
        if record["settings"] != settings:
            return False
        for name, size in record["splits"].items():
            dataset = IndexedDataset(folder / name)
            found = (len(dataset), dataset.total_tokens, read_metadata(folder / name).get("corpus_hash"))
            if found != (size["documents"], size["tokens"], settings["hash"]):
                return False
        tokenizer = record["tokenizer_hash"]
        return tokenizer is None or file_hash(folder / tokenizer_file) == tokenizer
    except (OSError, ValueError, KeyError, TypeError):  # whatever is wrong there, writing anew puts it right
        return False


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder, made where missing; wait while another process writes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"--output-dir {folder}: cannot be made ({error.strerror}); name another") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process writes there; waiting for it", folder)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _bar(what: str, total: int | None = None) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None)  # None: only on a terminal
