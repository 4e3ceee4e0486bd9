#!/usr/bin/env python3
"""Turn text into token files: train a tokenizer, then write train, tuning and validation.

Without --input the text is the source of the running Python's standard library, about 10 MB, on every machine.
Your own text may be larger than the memory. A document falls into a split by its hash, wherever it stands.

    python tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
    python tools/preprocess_data.py --output-dir data/mine --input a.jsonl.gz b.jsonl.gz --train-tokenizer 8192
    python tools/preprocess_data.py --output-dir data/book --input book.txt --txt-separator ''

Then: pretrain_gpt.py --train-data-path data/mine/train --valid-data-path data/mine/validation
Called again with the same text and flags it writes nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.flags import DescribedFormatter, Parser, add_section, build, typed_flags
from megatron.config.sections import implied_tokenizer
from megatron.data.preprocess import preprocess
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.round_trip import describe_changes
from megatron.errors import ConfigurationError
from megatron.log import configure_logging


def main() -> None:
    configure_logging()
    try:
        parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
        add_section(parser, PreprocessOptions, defaults=implied_tokenizer(typed_flags(sys.argv[1:])))
        asked = build(PreprocessOptions, parser.parse_known(sys.argv[1:]))
        report(asked.output_dir, preprocess(asked))
    except ConfigurationError as error:
        leave(error, 2)
    except OSError as error:
        leave(error, 1)
    except KeyboardInterrupt:
        leave("interrupted; nothing was changed", 130)


def report(folder: Path, summary: dict | None) -> None:
    """Say what was written."""
    if summary is None:
        print(f"{folder}: holds this corpus already")
        return
    for name, size in summary["splits"].items():
        print(f"{name}: {size['documents']:,} documents, {size['bytes']:,} bytes, {size['tokens']:,} tokens")
    for name, changes in summary["round_trip"].items():
        if changes["changed_documents"]:
            print(f"{name}: {describe_changes(summary['splits'][name]['documents'], changes)}", end="; ")
            example = changes["example"]
            print(f"{example['document']}, character {example['character']:,}: {example['text']!r}", end=" ")
            print(f"comes back as {example['decoded']!r}")
    for name, shared in summary["shared_13grams"].items():
        share = f" (measured on {shared['sampled']:.1%} of its documents)" if shared["sampled"] < 1 else ""
        print(f"{shared['ngrams']:.2%} of the 13-word runs of {name} are in train too{share}")


def leave(error: object, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
