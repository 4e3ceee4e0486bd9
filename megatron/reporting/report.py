"""The HTML report that compares runs: a table, paired differences, plots, conclusions and caveats."""

import base64
import html
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron.figures import add_legend, literal, pyplot
from megatron.reporting.runs import Difference, Run, best_point, check_comparable, curve, paired_difference

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette


def summarise(run: Run, tuning: str, validation: str) -> dict:
    """Return one row of the table: the run's best and last record on `validation`, and their paired difference."""
    best = best_point(run, tuning, validation)
    last = curve(run, validation)[-1]
    gap = paired_difference((run, last), (run, best))
    return {
        "name": run.name,
        "objective": {"ar": "AR", "mdm": "MDM"}.get(run.config["objective_name"], run.config["objective_name"]),
        "regularisers": run.regularisers(),
        "bound": run.is_bound(validation),
        "finished": run.finished,
        "best": best,
        "last": last,
        "gap": gap,
    }


def sentences(rows: list[dict], comparisons: list[tuple[str, str, Difference]]) -> list[str]:
    """Return the conclusions: overfitting, losses at equal compute, best points, paired differences."""
    lines = []
    for row in rows:
        name, best, gap = row["name"], row["best"], row["gap"]
        if row["last"]["iteration"] == best["iteration"] and not row["finished"]:
            lines.append(f"{name} is best at its last evaluation so far, at epoch {best['epoch']:.1f}.")
        elif row["last"]["iteration"] == best["iteration"]:
            lines.append(f"{name} is best at the end of its budget: a longer one might lower its loss.")
        elif gap.nats > 0.05 and gap.ratio > 5:
            lines.append(
                f"{name} overfits: its last loss is {gap.nats:.2f} nats ({gap.ratio:.0f} paired standard errors) above "
                f"its best, which it reached at epoch {best['epoch']:.1f}."
            )
        else:
            lines.append(
                f"{name} was best at epoch {best['epoch']:.1f}; its last loss differs from that by {gap.nats:+.3f} ± "
                f"{gap.se:.3f} nats."
            )
    max_flops = max(row["last"]["flops"] for row in rows)
    equal_compute = sorted(
        (row for row in rows if row["last"]["flops"] > 0.99 * max_flops), key=lambda row: row["last"]["loss"]
    )
    if len(equal_compute) > 1:
        losses = ", ".join(f"{row['name']} {_sign(row)}{row['last']['loss']:.2f}" for row in equal_compute)
        lines.append(f"After the same compute ({max_flops:.1e} FLOPs) the validation losses are: {losses}.")
    lowest = min(rows, key=lambda row: row["best"]["loss"])
    lines.append(f"At their best points, chosen on the tuning set, {lowest['name']} has the lowest validation loss.")
    for first, second, difference in comparisons:
        worse, better = (first, second) if difference.nats > 0 else (second, first)
        significance = "" if abs(difference.ratio) > 2 else ", within noise (2 standard errors)"
        lines.append(
            f"{worse} is {abs(difference.nats):.3f} ± {difference.se:.3f} nats per token above {better}{significance}."
        )
    return lines


def caveats(rows: list[dict], runs: list[Run]) -> list[str]:
    """Return the caveats: bounds, undecayed learning rates, unfinished runs, unequal compute, contamination, scope."""
    lines = []
    if any(row["bound"] for row in rows):
        lines.append(
            "MDM losses are upper bounds of the negative log-likelihood: the model may be better than its figure."
        )
    if any(row["last"]["iteration"] != row["best"]["iteration"] for row in rows):
        lines.append(
            "At a best point inside a run the learning rate has not yet decayed; a run whose budget ends there may "
            "reach a lower loss."
        )
    for run, row in zip(runs, rows):
        if not row["finished"]:
            total_epochs = run.config["train_samples"] / row["last"]["consumed_samples"] * row["last"]["epoch"]
            lines.append(
                f"{row['name']} is not finished: this is epoch {row['last']['epoch']:.1f} of {total_epochs:.1f}."
            )
    flops = [row["last"]["flops"] for row in rows]
    if max(flops) > 1.01 * min(flops):
        flops_by_run = ", ".join(f"{row['name']} {row['last']['flops']:.1e}" for row in rows)
        lines.append(f"The runs did not use the same compute (FLOPs: {flops_by_run}).")
    for name, shared in (runs[0].config["shared_13grams"] or {}).items():
        sample_note = "" if shared["sampled"] == 1 else f" (measured on {shared['sampled']:.1%} of its documents)"
        lines.append(
            f"Contamination: {shared['ngrams']:.1%} of the word 13-grams of the {name} set, in "
            f"{shared['documents']:.0%} of its documents, also occur in the training split{sample_note}."
        )
    source = "source code, not prose" if runs[0].config["corpus_source"] == "python-stdlib" else "one corpus"
    seeds = {run.config["training"]["seed"] for run in runs}
    seed_count = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    lines.append(
        f"{seed_count}, one model size, one set of unique tokens, {source}: the errors cover the choice of documents "
        "and the evaluation noise, not another seed, size or tuning."
    )
    return lines


def write_report(runs: list[Run], output: Path, tuning: str = "tuning", validation: str = "validation") -> str:
    """Write report.html and its plots into `output`; return the table as plain text."""
    check_comparable(runs)
    rows = [summarise(run, tuning, validation) for run in runs]
    points = [(run, row["best"]) for run, row in zip(runs, rows)]
    comparisons = [(a[0].name, b[0].name, paired_difference(a, b)) for a, b in combinations(points, 2)]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    plots = draw(runs, rows, output, validation)
    conclusions = sentences(rows, comparisons)
    warnings = caveats(rows, runs)
    page = render(runs, rows, comparisons, conclusions, warnings, plots)
    partial = output / "report.html.partial"
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(output / "report.html")
    return "\n".join([text_table(rows), "", *conclusions, "", *warnings])


HEADINGS = (
    "run",
    "objective",
    "regularisers",
    "best epoch",
    "FLOPs there",
    "validation loss",
    "bits/byte",
    "perplexity",
    "last loss",
    "last - best",
)


def _sign(row: dict) -> str:
    return "≤ " if row["bound"] else ""


def cells(row: dict) -> list[str]:
    """Return the cells of a row, in the order of HEADINGS."""
    best = row["best"]
    sign = _sign(row)
    errors = f"± {best['data_se']:.3f}" if best["data_se"] else ""
    errors += f" (mc {best['mc_se']:.3f})" if best["mc_se"] else ""
    return [
        row["name"],
        row["objective"],
        row["regularisers"],
        f"{best['epoch']:.1f}",
        f"{best['flops']:.1e}",
        f"{sign}{best['loss']:.3f} {errors}",
        f"{sign}{best['bits_per_byte']:.3f}" if best["bits_per_byte"] else "-",
        f"{sign}{np.exp(best['loss']):.1f}",
        f"{sign}{row['last']['loss']:.3f}",
        f"{row['gap'].nats:+.3f} ± {row['gap'].se:.3f}",
    ]


def text_table(rows: list[dict]) -> str:
    """Return the table as aligned plain text."""
    table = [HEADINGS, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def draw(runs: list[Run], rows: list[dict], output: Path, validation: str) -> dict[str, Path]:
    """Draw all plots as PNG files; return title -> file."""
    plots = {}

    def finish(figure, axes, names, title, file, xlabel, logarithmic=True):
        axes.set(xlabel=xlabel, ylabel="nats per token", title=title)
        if logarithmic:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if names:
            add_legend(axes, names)
        figure.savefig(output / file, dpi=120, bbox_inches="tight")
        pyplot().close(figure)
        plots[title] = output / file

    for key, label in (("epoch", "epochs of the unique tokens"), ("flops", "training FLOPs (6ND)")):
        (figure, axes), names = pyplot().subplots(figsize=(7, 4.5)), []
        for run, colour in zip(runs, COLOURS * len(runs)):
            records = curve(run, validation)
            losses = [record["loss"] for record in records]
            (line,) = axes.plot([record[key] for record in records], losses, "o-", ms=3, color=colour)
            names.append((line, run.name + (" (upper bound)" if run.is_bound(validation) else "")))
        finish(figure, axes, names, f"Validation loss against {label}", f"validation_{key}.png", label)
    (figure, axes), names = pyplot().subplots(figsize=(7, 4.5)), []
    for run, colour in zip(runs, COLOURS * len(runs)):
        (line,) = axes.plot(*_smooth(run.train), "--", color=colour, alpha=0.7)
        names.append((line, f"{run.name}, training"))
        records = curve(run, validation)
        losses = [record["loss"] for record in records]
        (line,) = axes.plot([record["epoch"] for record in records], losses, "-", color=colour)
        names.append((line, f"{run.name}, validation"))
    finish(
        figure,
        axes,
        names,
        "Training (dashed, with corruption and dropout) and validation",
        "train_validation.png",
        "epochs of the unique tokens",
    )
    figure, axes = pyplot().subplots(figsize=(7, 3))
    for index, (row, colour) in enumerate(zip(rows, COLOURS * len(rows))):
        best = row["best"]
        # the standard error over documents already includes the evaluation noise
        axes.errorbar(
            index, best["loss"], yerr=best["data_se"] or 0, fmt="v" if row["bound"] else "o", color=colour, capsize=4
        )
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    literal(*axes.get_xticklabels())
    axes.set_xlim(-0.5, len(rows) - 0.5)
    title = "Best points with standard errors (triangle: upper bound)"
    finish(figure, axes, [], title, "best.png", "", logarithmic=False)
    return plots


def _smooth(train: list[dict], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and losses averaged over at most `points` equal intervals of the run."""
    epochs, losses = np.array([[record["epoch"], record["loss"]] for record in train]).T
    intervals = np.array_split(np.arange(len(epochs)), min(points, len(epochs)))
    return np.array([epochs[i].mean() for i in intervals]), np.array([losses[i].mean() for i in intervals])


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}
td,th{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
td:nth-child(3){white-space:normal;min-width:11rem}code{background:#f4f4f4;padding:0 .2rem;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
img{width:100%}.scroll{overflow-x:auto}small{color:#555}dt{font-weight:bold}dd{margin:0 0 .5rem}
"""


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def render(runs, rows, comparisons, conclusions, warnings, plots) -> str:
    """Return the HTML page; it is self-contained, with plots inlined."""
    config, escape = runs[0].config, html.escape

    def items(lines: list[str]) -> str:
        return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"

    def table(headings, lines) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in headings)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'

    pairs = [(f"{a} - {b}", f"{d.nats:+.4f}", f"{d.se:.4f}", f"{d.ratio:+.1f}") for a, b, d in comparisons]
    pictures = "".join(f'<img alt="{escape(title)}" src="{_inline(path)}">' for title, path in plots.items())
    last = rows[0]["last"]
    is_stdlib = config["corpus_source"] == "python-stdlib"
    corpus = "the source code of Python's standard library" if is_stdlib else str(config["corpus_source"])
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    commands = "".join(f"<dt>{escape(run.name)}<dd><code>{escape(run.config['command'])}</code>" for run in runs)
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{escape(", ".join(run.name for run in runs))}</h1>
<p>{len(runs)} runs on {config["unique_tokens"]:,} unique tokens of {escape(corpus)}. {escape(runs[0].name)}:
{config["parameters"] / 1e6:.2f}M parameters, {last["consumed_tokens"]:,} training tokens, {last["epoch"]:.1f} epochs,
{last["flops"]:.2e} FLOPs (6ND). Every run is scored on the same held-out tokens with the same evaluation noise.</p>
<h2>Conclusions</h2>{items(conclusions)}
<h2>Caveats</h2>{items(warnings)}
<h2>Best points</h2>{table(HEADINGS, map(cells, rows))}
<p><small>Losses in nats per token. Best points are chosen on the tuning set and reported on the validation set.
±: standard error over documents; mc: standard error of the evaluation noise; ≤: upper bound; last - best: difference
paired by document.</small></p>
<h2>Paired differences at the best points</h2>
{table(("pair", "nats per token", "standard error", "ratio"), pairs)}
<h2>Plots</h2><div class="plots">{pictures}</div>
<h2>Provenance</h2>
<p>Corpus hash <code>{escape(str(config["corpus_hash"]))}</code>; {escape(config["precision"])} on
{escape(config["device"])}; {escape(versions)}; commit {escape(str(config["commit"]))}.</p><dl>{commands}</dl>
</body></html>
"""
