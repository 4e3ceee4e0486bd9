#!/usr/bin/env python3
"""Turn text into token files: split, train a tokenizer, tokenise, write train, tuning and validation.

Without --input the text is the source of the running Python's standard library, about 10 MB, on every machine.

    python tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
    python tools/preprocess_data.py --output-dir data/mine --input text.jsonl.gz --train-tokenizer 8192
"""

import argparse
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm  # noqa: E402

from megatron.data import corpus  # noqa: E402
from megatron.data.indexed import IndexedDatasetWriter  # noqa: E402
from megatron.data.tokenizer import build_tokenizer, train_tokenizer  # noqa: E402
from megatron.errors import ConfigurationError  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for {train,tuning,validation}.{bin,idx,json}"
    )
    parser.add_argument("--input", nargs="+", metavar="FILE", help="your own text: .txt, .jsonl, each also .gz or .zst")
    parser.add_argument("--json-key", default="text", help="field of a .jsonl line that holds the text (default: text)")
    parser.add_argument(
        "--splits", nargs=3, type=float, default=(80, 10, 10), metavar=("TRAIN", "TUNING", "VALIDATION"),
        help="shares of the splits (default: 80 10 10); the standard library is split by top-level package",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-type", default="HFTokenizer", choices=("HFTokenizer", "ByteTokenizer", "NullTokenizer"),
        help="(default: HFTokenizer)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-model", help="an existing tokenizer.json; default: train one on the training split"
    )
    parser.add_argument(
        "--train-tokenizer", type=int, default=512, metavar="V", help="ids of the trained BPE (default: 512)"
    )
    parser.add_argument("--vocab-size", type=int, help="ids of a NullTokenizer")
    return parser.parse_args()


def main() -> None:
    try:
        preprocess(parse())
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def preprocess(options: argparse.Namespace) -> None:
    """Write all splits, or say that they are there already."""
    documents = corpus.read_documents(options.input, options.json_key) if options.input else corpus.standard_library()
    split = corpus.split_documents(documents, tuple(options.splits))
    for name, held in split.items():
        if not any(document.text.strip() for document in held):
            raise ConfigurationError(
                f"--splits {' '.join(map(str, options.splits))}: the {name} split holds no text; add text or change the shares"
            )
    settings = {
        "hash": corpus.corpus_hash(split),
        "source": options.input or "python-stdlib",
        "tokenizer_type": options.tokenizer_type,
        "tokenizer_model": options.tokenizer_model,
        "train_tokenizer": options.train_tokenizer,
        "vocab_size": options.vocab_size,
        "splits": list(options.splits),
    }
    record = options.output_dir / "corpus.json"
    if record.exists() and json.loads(record.read_text())["settings"] == settings:
        print(f"{options.output_dir}: holds this corpus already")
        return
    tokenizer, model = prepare_tokenizer(options, split)
    sizes = {name: write(options, name, held, tokenizer, model, settings) for name, held in split.items()}
    duplicates = {name: corpus.near_duplicates(split["train"], split[name]) for name in ("tuning", "validation")}
    summary = {
        "settings": settings,
        "python_version": platform.python_version(),
        "splits": sizes,
        "shared_13grams": duplicates,
    }
    record.write_text(json.dumps(summary, indent=1))
    for name, size in sizes.items():
        shared = f", {duplicates[name]['ngrams']:.2%} of its 13-grams are in train" if name in duplicates else ""
        print(f"{name}: {size['documents']} documents, {size['bytes']:,} bytes, {size['tokens']:,} tokens{shared}")


def prepare_tokenizer(options: argparse.Namespace, split: dict):
    """Return the tokenizer and its file, relative to the output folder."""
    if options.tokenizer_type != "HFTokenizer":
        return build_tokenizer(options.tokenizer_type, None, options.vocab_size), None
    path = options.output_dir / "tokenizer.json"
    if options.tokenizer_model:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_existing(options.tokenizer_model).read_bytes())
    else:
        train_tokenizer((document.text for document in split["train"]), options.train_tokenizer, path)
    return build_tokenizer("HFTokenizer", path), path.name


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigurationError(f"--tokenizer-model {path}: no such file")
    return Path(path)


def write(options, name: str, documents: list, tokenizer, model: str | None, settings: dict) -> dict:
    """Tokenise and write one split; return its sizes."""
    prefix, tokens = options.output_dir / name, 0
    with IndexedDatasetWriter(prefix, tokenizer.vocabulary_size) as writer:
        for document in tqdm(documents, desc=name, unit="doc", disable=not sys.stderr.isatty()):
            ids = [*tokenizer.encode(document.text), tokenizer.eod]
            writer.add_document(ids)
            tokens += len(ids)
    size = {"documents": len(documents), "tokens": tokens, "bytes": sum(len(d.text.encode()) for d in documents)}
    metadata = {
        "tokenizer_type": options.tokenizer_type,
        "tokenizer_model": model,
        "vocab_size": options.vocab_size,
        "vocabulary_size": tokenizer.vocabulary_size,
        "eod": tokenizer.eod,
        "corpus_hash": settings["hash"],
        "source": settings["source"],
        "python_version": platform.python_version(),
        **size,
    }
    Path(f"{prefix}.json").write_text(json.dumps(metadata, indent=1))
    return size


if __name__ == "__main__":
    main()
