#!/usr/bin/env python3
"""Inspect token files: statistics, documents, training samples, duplicates.

    python tools/inspect_dataset.py data/mine/train
    python tools/inspect_dataset.py data/mine/train --document 0 17
    python tools/inspect_dataset.py data/mine/train --sample 0 1 --seq-length 512 --seed 1234
    python tools/inspect_dataset.py data/mine/train --near-duplicates --against data/mine/validation
    python tools/inspect_dataset.py data/mine/train --near-duplicates 0.9 --remove --output-prefix data/clean/train

Without other flags it prints the statistics of the data set. Files of Megatron-LM and Megatron-DeepSpeed are read as
they are. --near-duplicates needs the package rensa, the extra dedup. An entry of the index counts as a document.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.flags import DescribedFormatter, Parser, Section, add_section, build, flag, require
from megatron.data.copy_documents import Source, check_output
from megatron.data.inspection.clean import describe, write_clean
from megatron.data.inspection.duplicates import DEFAULT_THRESHOLD, DuplicateFlags, DuplicateOptions, find_duplicates
from megatron.data.inspection.excerpts import (
    SampleFlags,
    TokenizerFlags,
    decode,
    document_text,
    open_tokenizer,
    sample_texts,
)
from megatron.data.inspection.ngrams import DocumentTokens
from megatron.data.inspection.summary import summarize
from megatron.data.inspection.text import (
    document_title,
    duplicates_text,
    pieces_text,
    sample_title,
    shorten,
    summary_text,
)
from megatron.data.merge import check_equal
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.log import configure_logging

EXCERPT_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Section):
    """Output."""

    document: tuple[int, ...] = flag((), "show these documents, numbered from 0", metavar="N")
    json: bool = flag(False, "print JSON")
    plot: str | None = flag(None, "write a histogram of the lengths of documents, .png or .svg", metavar="FILE")

    def __post_init__(self):
        super().__post_init__()
        valid = self.plot is None or self.plot.endswith((".png", ".svg"))
        require(valid, "plot", self.plot, "is neither .png nor .svg; give one of them")


def main() -> None:
    """Inspect with the options of the command line."""
    configure_logging()
    try:
        run(read_options(sys.argv[1:]))
    except ConfigurationError as error:
        fail(error, 2)
    except BrokenPipeError:  # the reader, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(error, 1)
    except stop_signals.Interrupted as signal:
        fail("interrupted; nothing was written", signal.exit_code)


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Return the prefix and the sections of a command line.

    Raises: ConfigurationError for flags that cannot be used.
    """
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    parser.add_argument("prefix", metavar="PREFIX", help="data prefix, of PREFIX.bin and PREFIX.idx")
    sections = (OutputFlags, SampleFlags, DuplicateFlags, TokenizerFlags)
    for section in sections:
        add_section(parser, section, {})
    parser.add_argument(
        "--near-duplicates",
        nargs="?",
        type=threshold,
        const=DEFAULT_THRESHOLD,
        metavar="THRESHOLD",
        help="find documents whose n-grams have at least this Jaccard similarity, and equal ones (without a value: "
        "%(const)s)",
    )
    namespace = parser.parse_known(arguments)
    return argparse.Namespace(
        prefix=namespace.prefix,
        output=build(OutputFlags, namespace),
        sample=build(SampleFlags, namespace),
        duplicates=build(DuplicateOptions, namespace),
        tokenizer=build(TokenizerFlags, namespace),
    )


def threshold(text: str) -> float:
    """Return the value of --near-duplicates.

    Raises: ArgumentTypeError if it is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: is not a number; write it like {DEFAULT_THRESHOLD}") from None


def run(options: argparse.Namespace) -> None:
    """Print what the options ask for.

    Raises: ConfigurationError for data or flags that cannot be used, OSError if a file cannot be written.
    """
    source = Source.open(options.prefix)
    tokenizer = open_tokenizer(source, options.tokenizer)
    results, texts = {}, []
    if options.output.document:
        results["documents"] = [document_text(source, tokenizer, number) for number in options.output.document]
        texts += [pieces_text(document_title(shown), shown["text"]) for shown in results["documents"]]
    if options.sample.sample:
        results["samples"] = sample_texts(source, tokenizer, options.sample)
        texts += [pieces_text(sample_title(shown), shown["text"]) for shown in results["samples"]]
    if options.duplicates.searches:
        results["duplicates"], text = duplicates(source, tokenizer, options.duplicates)
        texts.append(text)
    if not results or options.output.plot:
        results["statistics"] = summarize(source, tokenizer)
        texts.append(summary_text(results["statistics"]))
    if options.output.plot:
        plot(results["statistics"], Path(options.output.plot))
    print(json.dumps(results, indent=1) if options.output.json else "\n\n".join(texts), flush=True)


def duplicates(source: Source, tokenizer: Tokenizer | None, options: DuplicateOptions) -> tuple[dict, str]:
    """Return the duplicates for JSON and as text; with --remove, write the data set without them.

    Raises: ConfigurationError, OSError as `run`.
    """
    against = None if options.against is None else Source.open(options.against)
    if options.output_prefix is not None:
        check_output(options.output_prefix, tuple(filter(None, (source.prefix, options.against))))
    if against:
        check_equal([source, against], "compare")
    eod = tokenizer.eod if tokenizer else source.metadata.get("eod")
    tokens = DocumentTokens(source.dataset, eod)
    others = DocumentTokens(against.dataset, eod) if against else None
    clusters = find_duplicates(tokens, others, options)
    summary = describe(source, tokens, clusters, options)

    def excerpt(document: int) -> str:
        ids = tokens.ids(document)[:EXCERPT_TOKENS]
        if tokenizer is None:
            return shorten(" ".join(map(str, ids.tolist())))
        return shorten(" ".join(decode(source, tokenizer, ids, f"--document {document}")))

    for cluster in summary.get("largest_clusters", ()):
        cluster["excerpt"] = excerpt(cluster["first_documents"][0])
    text = duplicates_text(summary, excerpt)
    if options.remove:
        metadata = write_clean(source, clusters, options, against)
        summary["written"] = {"prefix": options.output_prefix, **metadata["removed"][-1]}
        text += (
            f"\n\n{options.output_prefix}: {metadata['documents']:,} documents, {metadata['tokens']:,} tokens; "
            f"{summary['written']['documents']:,} documents removed, listed in {options.output_prefix}.removed.jsonl"
        )
    return summary, text


def plot(statistics: dict, path: Path) -> None:
    """Write the histogram of the lengths of documents."""
    from megatron.reporting.plots import pyplot, save_png, save_svg

    bins = statistics["lengths"]["histogram"]
    figure, axes = pyplot().subplots(figsize=(7, 4))
    axes.bar(range(len(bins)), [count for _, _, count in bins], width=0.9)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in bins]
    axes.set_xticks(range(len(bins)), labels, rotation=45, ha="right")
    axes.set(xlabel="tokens a document", ylabel="documents")
    axes.set_title(statistics["prefix"], parse_math=False)
    try:
        (save_svg if path.suffix == ".svg" else save_png)(figure, path)
    except OSError as error:
        raise ConfigurationError(f"--plot {path}: cannot be written ({error.strerror}); name another file") from None


def fail(error: object, code: int) -> None:
    """Print an error and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    stop_signals.run_tool(main)
