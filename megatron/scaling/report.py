"""Compare runs: one page, one table, and what the numbers can and cannot say.

Best points are chosen on the tuning set and reported on the validation set. Two models are compared paired by
document: the ratio estimator sum(n1 - n2) / sum(tokens) with documents as clusters, the Monte-Carlo error of
masked diffusion added in quadrature.
"""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError

# what must agree before two losses stand in one table
SAME = {"corpus_hash": "corpus", "vocabulary_size": "vocabulary", "unique_tokens": "unique tokens"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette
REGULARISERS = {
    "token_dropout": "token dropout {}",
    "token_dropout_max": "token dropout U(0, {})",
    "mlp_dropout": "MLP dropout {}",
    "attention_dropout": "attention dropout {}",
    "hidden_dropout": "hidden dropout {}",
    "embedding_dropout": "embedding dropout {}",
}


@dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    name: str
    folder: Path
    config: dict
    train: list[dict]
    valid: dict[str, list[dict]]  # by set

    @property
    def is_bound(self) -> bool:
        return self.config["objective_name"] != "ar"

    def regularisers(self) -> str:
        settings = self.config["model"] | self.config["objective"]
        said = [text.format(settings[name]) for name, text in REGULARISERS.items() if settings[name]]
        return ", ".join([*said, f"weight decay {self.config['optimizer']['weight_decay']}"])


@dataclass(frozen=True)
class Difference:
    """Nats per token by which one evaluation exceeds another, paired by document."""

    nats: float
    se: float

    @property
    def ratio(self) -> float:
        return self.nats / self.se if self.se else float("inf")


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; raise ConfigurationError where it holds no validation."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ConfigurationError(f"{folder}: holds no run (no config.json); give a folder that --save wrote")
    config = json.loads((folder / "config.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = {}
    for record in records:
        if record["kind"] == "valid":
            valid.setdefault(record["set"], []).append(record)
    if not valid:
        raise ConfigurationError(f"{folder}: holds no validation record; train with --valid-data-path")
    return Run(folder.name, folder, config, [r for r in records if r["kind"] == "train"], valid)


def curve(run: Run, name: str) -> list[dict]:
    if name not in run.valid:
        raise ConfigurationError(f"{run.folder}: has no validation set {name}; it has {', '.join(run.valid)}")
    return run.valid[name]


def best_point(run: Run, tuning: str, reported: str) -> dict:
    """Return the record on `reported` at the step where `tuning` is lowest."""
    step = min(curve(run, tuning), key=lambda record: record["loss"])["iteration"]
    return next(record for record in curve(run, reported) if record["iteration"] == step)


def paired_difference(first: tuple[Run, dict], second: tuple[Run, dict]) -> Difference:
    """Return how much worse the first evaluation is than the second; each is (run, valid record)."""
    one, two = (_documents(*point) for point in (first, second))
    if not np.array_equal(one["tokens"], two["tokens"]):
        raise ConfigurationError(
            f"{first[0].folder} and {second[0].folder}: scored different tokens and cannot be paired"
        )
    tokens = one["tokens"].sum()
    nats = [np.atleast_2d(part["nats"]) for part in (one, two)]
    difference = nats[0].mean(0) - nats[1].mean(0)
    mean = difference.sum() / tokens
    seen = one["tokens"] > 0
    clusters = int(seen.sum())
    residual = (difference - mean * one["tokens"])[seen]
    variance = clusters / max(1, clusters - 1) * (residual**2).sum() / tokens**2
    # two evaluations of one run share their noise, replicate by replicate; those of two objectives do not
    if len(nats[0]) == len(nats[1]) > 1:
        spread = [(nats[0] - nats[1]).sum(1) / tokens]
    else:
        spread = [part.sum(1) / tokens for part in nats if len(part) > 1]
    variance += sum(part.var(ddof=1) / len(part) for part in spread)
    return Difference(float(mean), float(np.sqrt(variance)))


def _documents(run: Run, record: dict):
    path = run.folder / "validation" / record["set"] / f"{record['iteration']}.npz"
    if not path.exists():
        raise ConfigurationError(f"{path}: is missing; a paired comparison needs it")
    return np.load(path)


def check_comparable(runs: list[Run]) -> None:
    """Refuse one table for runs on different text, vocabulary, unique tokens or alignment."""
    first = runs[0]
    for run in runs[1:]:
        for key, what in SAME.items():
            if run.config[key] != first.config[key]:
                raise ConfigurationError(
                    f"{first.folder} and {run.folder}: differ in {what} ({first.config[key]} and {run.config[key]}); report them apart"
                )
        alignments = {r["alignment"] for member in (first, run) for records in member.valid.values() for r in records}
        if len(alignments) > 1:
            raise ConfigurationError(
                f"{first.folder} and {run.folder}: differ in --eval-alignment {sorted(alignments)}; report them apart"
            )


def summarise(run: Run, tuning: str, validation: str) -> dict:
    """Return one row of the table."""
    best, last = best_point(run, tuning, validation), curve(run, validation)[-1]
    gap = paired_difference((run, last), (run, best))
    return {
        "name": run.name,
        "objective": {"ar": "AR", "mdm": "MDM"}.get(run.config["objective_name"], run.config["objective_name"]),
        "regularisers": run.regularisers(),
        "bound": run.is_bound,
        "best": best,
        "last": last,
        "gap": gap,
    }


def sentences(rows: list[dict], comparisons: list[tuple[str, str, Difference]], runs: list[Run]) -> list[str]:
    """Return what the numbers say, and what they cannot say."""
    said = []
    for row in rows:
        if row["gap"].nats > 0.05 and row["gap"].ratio > 5:
            said.append(
                f"{row['name']} overfits: by its last step its loss is {row['gap'].nats:.2f} nats above its best, "
                f"which it reached at epoch {row['best']['epoch']:.1f} ({row['gap'].ratio:.0f} paired standard errors)."
            )
        elif row["last"]["iteration"] == row["best"]["iteration"]:
            said.append(f"{row['name']} is still improving at the end of its budget: more epochs might lower it.")
    lowest = min(rows, key=lambda row: row["best"]["loss"])
    said.append(f"At their best points, chosen on the tuning set, the lowest validation loss is {lowest['name']}'s.")
    for first, second, difference in comparisons:
        worse, better = (first, second) if difference.nats > 0 else (second, first)
        clear = "" if abs(difference.ratio) > 2 else ", which is not clear of noise"
        said.append(
            f"{worse} is {abs(difference.nats):.3f} ± {difference.se:.3f} nats per token above {better}{clear}."
        )
    if any(row["bound"] for row in rows):
        said.append(
            "MDM losses are upper bounds of the negative log-likelihood: the model may be better than its figure."
        )
    source = "source code, not prose" if runs[0].config["corpus_source"] == "python-stdlib" else "one corpus"
    said.append(
        f"This is one seed, one model size, one set of unique tokens and {source}; the errors cover the choice of "
        "documents and the evaluation noise, not another seed, size or tuning."
    )
    return said


def write_report(runs: list[Run], output: Path, tuning: str = "tuning", validation: str = "validation") -> str:
    """Write report.html and its plots into `output`; return the table as plain text."""
    check_comparable(runs)
    rows = [summarise(run, tuning, validation) for run in runs]
    points = {run.name: (run, row["best"]) for run, row in zip(runs, rows)}
    comparisons = [
        (a.name, b.name, paired_difference(points[a.name], points[b.name]))
        for index, a in enumerate(runs)
        for b in runs[index + 1 :]
    ]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    plots = draw(runs, rows, output, validation)
    said = sentences(rows, comparisons, runs)
    page = render(runs, rows, comparisons, said, plots)
    aside = output / "report.html.partial"
    aside.write_text(page, encoding="utf-8")
    aside.replace(output / "report.html")
    return text_table(rows) + "\n\n" + "\n".join(said)


HEADINGS = (
    "run",
    "objective",
    "regularisers",
    "best epoch",
    "validation loss",
    "bits/byte",
    "perplexity",
    "last loss",
    "last - best",
)


def cells(row: dict) -> list[str]:
    best, sign = row["best"], "≤ " if row["bound"] else ""
    errors = (f"± {best['data_se']:.3f}" if best["data_se"] else "") + (
        f" (mc {best['mc_se']:.3f})" if best["mc_se"] else ""
    )
    bits = f"{sign}{best['bits_per_byte']:.3f}" if best["bits_per_byte"] else "-"
    return [
        row["name"], row["objective"], row["regularisers"], f"{best['epoch']:.1f}", f"{sign}{best['loss']:.3f} {errors}",
        bits, f"{sign}{np.exp(best['loss']):.1f}", f"{sign}{row['last']['loss']:.3f}",
        f"{row['gap'].nats:+.3f} ± {row['gap'].se:.3f}",
    ]  # fmt: skip


def text_table(rows: list[dict]) -> str:
    table = [HEADINGS, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def draw(runs: list[Run], rows: list[dict], output: Path, validation: str) -> dict[str, Path]:
    """Draw all plots as PNG files; return title -> file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = {}

    def finish(figure, axes, title, file, xlabel, logarithmic=True):
        axes.set(xlabel=xlabel, ylabel="nats per token", title=title)
        if logarithmic:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figure.savefig(output / file, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        plots[title] = output / file

    for key, label in (("epoch", "epochs of the unique tokens"), ("flops", "training FLOPs (6ND)")):
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for run, colour in zip(runs, COLOURS * len(runs)):
            records = curve(run, validation)
            label_ = run.name + (" (upper bound)" if run.is_bound else "")
            axes.plot([r[key] for r in records], [r["loss"] for r in records], "o-", ms=3, color=colour, label=label_)
        finish(figure, axes, f"Validation loss against {label}", f"validation_{key}.png", label)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for run, colour in zip(runs, COLOURS * len(runs)):
        epochs, losses = _smooth(run.train)
        axes.plot(epochs, losses, "--", color=colour, alpha=0.7, label=f"{run.name}, training")
        records = curve(run, validation)
        axes.plot(
            [r["epoch"] for r in records],
            [r["loss"] for r in records],
            "-",
            color=colour,
            label=f"{run.name}, validation",
        )
    finish(
        figure,
        axes,
        "Training (dashed, its own corruption and dropout) and validation",
        "train_validation.png",
        "epochs of the unique tokens",
    )
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for index, (row, colour) in enumerate(zip(rows, COLOURS * len(rows))):
        best = row["best"]
        error = np.hypot(best["data_se"] or 0, best["mc_se"] or 0)
        axes.errorbar(index, best["loss"], yerr=error, fmt="v" if row["bound"] else "o", color=colour, capsize=4)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    finish(figure, axes, "Best points with standard errors (triangle: upper bound)", "best.png", "", logarithmic=False)
    return plots


def _smooth(train: list[dict], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and losses averaged over equal stretches of the run."""
    epochs, losses = np.array([[r["epoch"], r["loss"]] for r in train]).T
    parts = np.array_split(np.arange(len(epochs)), min(points, len(epochs)))
    return np.array([epochs[p].mean() for p in parts]), np.array([losses[p].mean() for p in parts])


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}code{background:#f4f4f4;padding:0 .2rem}.scroll{overflow-x:auto}small{color:#555}
"""


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def render(runs, rows, comparisons, said, plots) -> str:
    """Return the page; nothing in it comes from elsewhere."""
    config, escape = runs[0].config, html.escape
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in rows)
    pairs = "".join(
        f"<tr><td>{escape(a)} − {escape(b)}</td><td>{d.nats:+.4f}</td><td>{d.se:.4f}</td><td>{d.ratio:+.1f}</td></tr>"
        for a, b, d in comparisons
    )
    pictures = "".join(
        f'<figure><img alt="{escape(title)}" src="{_inline(path)}"></figure>' for title, path in plots.items()
    )
    last = curve(runs[0], next(iter(runs[0].valid)))[-1]
    corpus = (
        "the source code of Python's standard library"
        if config["corpus_source"] == "python-stdlib"
        else config["corpus_source"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    details = "".join(
        f"<li><b>{escape(run.name)}</b>: <code>{escape(run.config['command'])}</code></li>" for run in runs
    )
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Runs compared</title><style>{STYLE}</style>
<h1>{escape(", ".join(run.name for run in runs))}</h1>
<p>{len(runs)} runs on {config["unique_tokens"]:,} unique tokens of {escape(str(corpus))}; {config["parameters"] / 1e6:.2f}M parameters,
{last["consumed_tokens"]:,} training tokens and {last["flops"]:.2e} FLOPs (6ND) in the first run. Validation scores the same held-out tokens with the same noise for every run.</p>
<h2>What the numbers say</h2><ul>{"".join(f"<li>{escape(line)}</li>" for line in said)}</ul>
<h2>Best points</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>
<p><small>Losses in nats per token. Best points are chosen on the tuning set and reported on the validation set. ±: standard error over
documents; mc: standard error of the evaluation noise; ≤: upper bound.</small></p>
<h2>Paired differences at the best points</h2><table><tr><th>pair</th><th>nats per token</th><th>standard error</th><th>ratio</th></tr>{pairs}</table>
<h2>Plots</h2>{pictures}
<h2>How it was made</h2><p>Corpus hash <code>{escape(str(config["corpus_hash"]))}</code>; {escape(config["precision"])} on {escape(config["device"])};
{escape(versions)}; commit {escape(str(config["commit"]))}.</p><ul>{details}</ul></html>
"""
