#!/usr/bin/env python3
"""Preprocess text into token files: train a tokenizer, then write the train, tuning and validation splits.

Without --input the text is the source of the running Python's standard library, about 10 MB.
Your own text may be larger than RAM. The split of a document depends on its hash only.

    python tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
    python tools/preprocess_data.py --output-dir data/mine --input a.jsonl.gz b.jsonl.gz --train-tokenizer 8192
    python tools/preprocess_data.py --output-dir data/book --input book.txt --txt-separator ''

Then: pretrain_gpt.py --train-data-path data/mine/train --valid-data-path data/mine/validation
With the same text and flags, a second call writes nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.flags import DescribedFormatter, Parser, add_section, build, typed_flags
from megatron.config.tokenizer_flags import implied_tokenizer
from megatron.data.preprocess import preprocess
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.round_trip import describe_changes
from megatron.errors import ConfigurationError
from megatron.log import configure_logging


def main() -> None:
    """Preprocess with the options of the command line, and print a summary."""
    configure_logging()
    try:
        parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
        add_section(parser, PreprocessOptions, defaults=implied_tokenizer(typed_flags(sys.argv[1:])))
        options = build(PreprocessOptions, parser.parse_known(sys.argv[1:]))
        report(options.output_dir, preprocess(options))
    except ConfigurationError as error:
        fail(error, 2)
    except OSError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("interrupted; nothing was changed", 130)


def report(folder: Path, summary: dict | None) -> None:
    """Print the splits, the changes of the round trip, and the contamination."""
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
            print(f"becomes {example['decoded']!r}")
    for name, shared in summary["shared_13grams"].items():
        share = f" (measured on {shared['sampled']:.1%} of its documents)" if shared["sampled"] < 1 else ""
        print(f"{shared['ngrams']:.2%} of the 13-grams of {name} are also in train{share}")


def fail(error: object, code: int) -> None:
    """Print an error and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
