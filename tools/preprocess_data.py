#!/usr/bin/env python3
"""Preprocess text into token files: train a tokenizer, then write the train, tuning and validation splits.

Without --input the text is the source of the running Python's standard library, about 10 MB.
Your own text may be larger than RAM. The split of a document depends on its hash only.

    python tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
    python tools/preprocess_data.py --output-dir data/mine --input a.jsonl.gz b.jsonl.gz --train-tokenizer 8192
    python tools/preprocess_data.py --output-dir data/docs --input 'docs/**/*.md' --txt
    python tools/preprocess_data.py --output-dir data/c4 --input c4/ --tokenizer-model gpt2 --splits 98 1 1

Then: pretrain_gpt.py --train-data-path data/mine/train --valid-data-path data/mine/validation
With the same text and flags, a second call writes nothing; after an interruption it resumes.

Megatron's command line gives Megatron's files, mine_text_document.bin and .idx:

    python tools/preprocess_data.py --input mine.jsonl --output-prefix mine --vocab-file gpt2-vocab.json \\
        --merge-file gpt2-merges.txt --append-eod --workers 8
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.compatibility import described, translate
from megatron.config.flags import DescribedFormatter, Parser, add_section, build, typed_flags
from megatron.config.tokenizer_flags import implied_tokenizer
from megatron.data.preprocess import preprocess, resume_note
from megatron.data.preprocess_options import TABLE, PreprocessOptions
from megatron.data.round_trip import describe_changes
from megatron.errors import ConfigurationError
from megatron.log import configure_logging


def main() -> None:
    """Preprocess with the options of the command line, and print a summary."""
    configure_logging()
    options = None
    try:
        parser = Parser(
            description=__doc__, epilog=megatron_flags(), formatter_class=DescribedFormatter, allow_abbrev=False
        )
        add_section(parser, PreprocessOptions, defaults=implied_tokenizer(typed_flags(sys.argv[1:])))
        options = build(PreprocessOptions, parser.parse_known(translate(sys.argv[1:], 1, TABLE)))
        start = time.monotonic()
        summary = preprocess(options)
        report(options, summary, time.monotonic() - start)
    except ConfigurationError as error:
        fail(f"{error}{resume_note(options, error)}", 2)
    except OSError as error:
        fail(f"{error}{resume_note(options)}", 1)
    except stop_signals.Interrupted as signal:
        fail(f"interrupted{resume_note(options) or '; nothing was changed'}", signal.exit_code)


def megatron_flags() -> str:
    """Return the table of Megatron's flags for --help."""
    lines = (f"  {name:30} {described(entry)}" for name, entry in sorted(TABLE.items()))
    return "\n".join(["Flags of Megatron and aliases:", *lines])


def report(options: PreprocessOptions, summary: dict | None, seconds: float) -> None:
    """Print the sizes of the data sets, what was skipped, the changes of the round trip, and the contamination."""
    if summary is None:
        print(f"{options.target}: holds this corpus already")
        return
    for name, size in summary["splits"].items():
        print(
            f"{name}: {size['documents']:,} documents, {size['bytes']:,} bytes, {size['tokens']:,} tokens, "
            f"{size['bytes'] / max(1, size['tokens']):.2f} bytes per token"
        )
    if summary["skipped"]:
        print("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in summary["skipped"].items()))
    for name, changes in summary["round_trip"].items():
        if changes["changed_documents"]:
            print(f"{name}: {describe_changes(summary['splits'][name]['documents'], changes)}", end="; ")
            example = changes["example"]
            print(f"{example['document']}, character {example['character']:,}: {example['text']!r}", end=" ")
            print(f"becomes {example['decoded']!r}")
    for name, shared in summary["shared_13grams"].items():
        product = f" (samples: share of its documents times share of train's 13-grams {shared['sampled']:.1%})"
        sample_note = product if shared["sampled"] < 1 else ""
        print(f"{shared['ngrams']:.2%} of the 13-grams of {name} are also in train{sample_note}")
    megabytes = sum(size["bytes"] for size in summary["splits"].values()) / 1e6
    print(f"{seconds:.1f} s, {megabytes / max(1e-3, seconds):.1f} MB of text per second")


def fail(error: object, code: int) -> None:
    """Print an error and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    stop_signals.run_tool(main)
