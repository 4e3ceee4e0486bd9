#!/usr/bin/env python3
"""Merge data sets of one tokenizer into one: the documents of the first input, then those of the next.

    python tools/merge_datasets.py --input data/a/train data/b/train --output-prefix data/both/train
    python tools/merge_datasets.py --input data/shards --output-prefix data/whole/train

An input is a data prefix (of PREFIX.bin and PREFIX.idx), or a folder for all its data sets in sorted order. Files of
Megatron-LM and Megatron-DeepSpeed are read as they are. Inputs are refused if their dtypes or recorded tokenizers
differ. To mix data sets at other shares than their sizes, no merge is needed: --train-data-path takes weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.flags import DescribedFormatter, Parser, add_section, build, flag
from megatron.data.merge import input_prefixes, merge
from megatron.errors import ConfigurationError
from megatron.log import configure_logging


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Data sets."""

    input: tuple[str, ...] = flag(help="data prefixes, or folders of data sets", metavar="PREFIX")
    output_prefix: str = flag(help="data prefix of the merged data set, which must be new", metavar="OUT")


def main() -> None:
    """Merge the inputs of the command line, and print the size of the result."""
    configure_logging()
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(parser, MergeOptions, {})
    try:
        options = build(MergeOptions, parser.parse_known(sys.argv[1:]))
        prefixes = input_prefixes(options.input)
        metadata = merge(prefixes, options.output_prefix)
        sizes = f"{metadata['documents']:,} documents, {metadata['tokens']:,} tokens"
        print(f"{options.output_prefix}: {sizes} of {len(prefixes)} data sets", flush=True)
    except ConfigurationError as error:
        fail(error, 2)
    except OSError as error:
        fail(error, 1)
    except stop_signals.Interrupted as signal:
        fail("interrupted; nothing was written", signal.exit_code)


def fail(error: object, code: int) -> None:
    """Print an error and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    stop_signals.run_tool(main)
