#!/usr/bin/env python3
"""Rebuild the index of token files: PREFIX.idx from the tokens of PREFIX.bin.

    python tools/rebuild_index.py data/foreign/train

For files of Megatron-DeepSpeed's --append-eod, whose index does not count the end-of-document token that it appends,
and for pointers that overflowed 32 bits in a merge. The old index is kept as PREFIX.idx.bak. If neither error explains
the tokens, nothing is changed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.data.rebuild_index import rebuild_index
from megatron.errors import ConfigurationError


def main() -> None:
    """Rebuild the index of the command line's prefix, and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="data prefix, of PREFIX.bin and PREFIX.idx")
    prefix = parser.parse_args().prefix
    try:
        rebuilt = rebuild_index(prefix)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {prefix}.idx: cannot be written ({error.strerror})", file=sys.stderr) or 1)
    except stop_signals.Interrupted as signal:
        sys.exit(print("error: interrupted; nothing was written", file=sys.stderr) or signal.exit_code)
    if rebuilt is None:
        print(f"{prefix}.idx: matches its tokens already; nothing was changed")
        return
    change = "pointers recomputed" if rebuilt.end_id is None else f"every document now ends in its id {rebuilt.end_id}"
    print(
        f"{prefix}.idx: {rebuilt.documents:,} documents, {rebuilt.tokens:,} tokens, {change}; "
        f"the old index is {rebuilt.backup}"
    )


if __name__ == "__main__":
    stop_signals.run_tool(main)
