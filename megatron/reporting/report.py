"""The HTML report that compares runs: a table, paired differences, plots, conclusions and caveats."""

import base64
import html
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron.reporting.plots import plot_runs
from megatron.reporting.runs import Difference, Run, best_point, check_comparable, curve, paired_difference


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
    plots = plot_runs(runs, rows, output, validation)
    conclusions = sentences(rows, comparisons)
    warnings = caveats(rows, runs)
    page = render(runs, rows, comparisons=comparisons, conclusions=conclusions, warnings=warnings, plots=plots)
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


def render(
    runs: list[Run],
    rows: list[dict],
    *,
    comparisons: list[tuple[str, str, Difference]],
    conclusions: list[str],
    warnings: list[str],
    plots: dict[str, Path],
) -> str:
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
