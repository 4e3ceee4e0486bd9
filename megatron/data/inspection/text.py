"""Statistics, documents, samples and duplicates as text for a terminal."""

from collections.abc import Callable

BAR_WIDTH = 40  # characters
EXCERPT = 160  # characters
END = "--- end of document ---"


def summary_text(summary: dict) -> str:
    """Return the statistics of `summarize`."""
    lengths, vocabulary = summary["lengths"], summary["vocabulary"]
    documents, tokens = summary["documents"], summary["tokens"]
    rows = [
        ("documents", f"{documents:,}"),
        ("tokens", f"{tokens:,}, as {summary['dtype']}"),
        ("tokens a document", _lengths_text(lengths)),
        ("empty documents", f"{summary['empty_documents']:,}"),
    ]
    if summary["grouped_documents"] != documents:
        grouped = f"the index groups these {documents:,} into {summary['grouped_documents']:,}, such as sentences"
        rows.insert(1, ("", f"{grouped}; training reads the {documents:,}"))
    if summary["eod"] is None:
        rows.append(("end of document", "token unknown; give the tokenizer"))
    else:
        without = summary["documents_without_eod"]
        state = "all documents end with it" if not without else f"{without:,} documents do not end with it"
        inside = summary["eod_tokens"] - (documents - without)
        state += f", and it occurs {inside:,} times inside documents" if inside else ""
        rows.append(("end of document", f"id {summary['eod']}; {state}"))
    if summary["bytes_per_token"] is not None:
        rows.append(("text", f"{summary['text_bytes']:,} bytes, {summary['bytes_per_token']:.3f} per token"))
    rows += _vocabulary_rows(vocabulary)
    if summary["tokenizer_type"]:
        rows.append(("tokenizer", summary["tokenizer_type"]))
    if summary["corpus_hash"]:
        rows.append(("corpus hash", summary["corpus_hash"]))
    lines = [f"{name:19}{value}" for name, value in rows]
    return "\n".join([summary["prefix"], *lines, "", *_histogram(lengths["histogram"], documents)])


def _lengths_text(lengths: dict) -> str:
    quantiles = lengths["quantiles"]
    shown = f"{quantiles['0.05']:,} / {quantiles['0.5']:,} / {quantiles['0.95']:,}"
    return f"{lengths['mean']:,.1f} on average, {lengths['min']:,} to {lengths['max']:,}; 5% / 50% / 95%: {shown}"


def _vocabulary_rows(vocabulary: dict) -> list[tuple[str, str]]:
    size, used = vocabulary["size"], vocabulary["used"]
    share = f"{used:,} ids" if size is None else f"{used:,} ids of {size:,} ({vocabulary['share_used']:.1%})"
    rows = [("vocabulary in use", f"{share}, entropy {vocabulary['entropy_bits']:.2f} bits per token")]
    if vocabulary["outside"]:
        rows.append(
            ("", f"{vocabulary['outside']:,} tokens are OUTSIDE the vocabulary, up to {vocabulary['largest_id']}")
        )
    for name in ("most_frequent", "least_frequent"):
        tokens = (f"{_token(entry)} {entry['count']:,}" for entry in vocabulary[name])
        rows.append((name.replace("_", " "), ", ".join(tokens)))
    return rows


def _token(entry: dict) -> str:
    return f"id {entry['id']}" if entry["text"] is None else repr(entry["text"])


def _histogram(bins: list, documents: int) -> list[str]:
    largest = max(count for _, _, count in bins)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in bins]
    width = max(map(len, labels))
    lines = ["documents by length in tokens"]
    for label, (_, _, count) in zip(labels, bins):
        bar = "#" * -(-count * BAR_WIDTH // largest)
        lines.append(f"  {label:>{width}}  {bar:{BAR_WIDTH}}  {count:,} ({count / documents:.1%})")
    return lines


def pieces_text(title: str, pieces: list[str]) -> str:
    """Return a title and the pieces of text between end-of-document tokens."""
    return f"{title}\n" + f"\n{END}\n".join(pieces)


def document_title(shown: dict) -> str:
    """Return the title of a document."""
    return f"=== document {shown['document']:,}: {shown['tokens']:,} tokens"


def sample_title(shown: dict) -> str:
    """Return the title of a training sample."""
    ids = len(shown["ids"])
    return f"=== sample {shown['sample']:,}, at epoch {shown['epoch']:.4f}: {ids:,} tokens, the last only a target"


def duplicates_text(summary: dict, excerpt: Callable[[int], str]) -> str:
    """Return the summary of duplicates; `excerpt` returns the beginning of a document as text."""
    parameters = summary["parameters"]
    lines = []
    for key, where in (("within", "an earlier document"), ("against", "a document of {prefix}")):
        if key not in summary:
            continue
        where = where.format(prefix=summary[key].get("prefix"))
        lines.append(_counts_text(summary[key]["equal"], summary["documents"], f"equal {where}"))
        if parameters["threshold"] is not None:
            lines.append(_counts_text(summary[key]["near"], summary["documents"], f"nearly equal {where}"))
    if parameters["threshold"] is not None:
        lines.append(
            f"nearly equal: Jaccard similarity of token {parameters['ngram']}-grams >= {parameters['threshold']:g}; "
            f"{summary['verified_pairs']:,} of {summary['compared_pairs']:,} compared candidate pairs reach it, and a "
            f"pair at the threshold is a candidate with probability {parameters['recall_at_threshold']:.4f}"
        )
    for cluster in summary.get("largest_clusters", ()):
        first = cluster["first_documents"][0]
        lowest = min(cluster["similarity_to_first"])
        others = ", ".join(map(str, cluster["first_documents"])) + (
            ", ..." if cluster["documents"] > len(cluster["first_documents"]) else ""
        )
        lines += [
            "",
            f"cluster of {cluster['documents']:,} documents, {cluster['tokens']:,} tokens: {others} "
            f"(similarity to the first at least {lowest:.3f})",
            f"  {excerpt(first)}",
        ]
    for shared in summary.get("against", {}).get("examples", ()):
        lines += [
            "",
            f"document {shared['document']} is document {shared['other_document']} of {summary['against']['prefix']} "
            f"(similarity {shared['similarity']:.3f})",
            f"  {excerpt(shared['document'])}",
        ]
    return "\n".join(lines)


def _counts_text(counts: dict, documents: int, what: str) -> str:
    share = f"{counts['documents'] / documents:.2%}"
    return (
        f"{counts['documents']:,} documents ({share}) {what}; {counts['tokens']:,} tokens "
        f"({counts['share_of_tokens']:.2%})"
    )


def shorten(text: str) -> str:
    """Return the beginning of a text in one line."""
    line = " ".join(text[: 4 * EXCERPT].split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 3] + "..."
