#!/usr/bin/env python3
"""Turn the files of gpu.sh into Markdown tables with the gates, and write them into docs/performance.md.

    python benchmarks/report_gpu.py --folder results/gpu
    python benchmarks/report_gpu.py --folder results/gpu --page docs/performance.md

With --page the tables replace what is between the two marks of that page. Figures of a rehearsal on a CPU are printed
as such, and never written into a page.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import environment_line, markdown_table, read_lines, refuse
from benchmarks.training_step.gates import GPU, gate
from megatron.config.flags import require
from megatron.errors import ConfigurationError

MARKS = ("<!-- figures of gpu.sh, written by benchmarks/report_gpu.py -->\n", "<!-- end of the figures of gpu.sh -->\n")
NOTHING = "**No figure has been measured on a GPU yet.**\n"
REHEARSAL = "**A rehearsal on a CPU: none of these figures says anything about a GPU.**\n"
STEPS = (*GPU, "published")  # names of the files of training_step/
STEP_COLUMNS = ("size", "implementation", "ms/step", "tokens/s", "mfu_palm", "util_ceiling", "util_exec")
STEP_COLUMNS += ("step / floor", "step GB")
SETTING_COLUMNS = ("setting", "tokens/s", "relative", "peak GB", "first step, s")


@dataclass(frozen=True)
class Results:
    """What gpu.sh measured, as far as it got."""

    checks: list[dict]
    settings: list[dict]
    steps: dict[str, dict]  # reports of training_step/, by the name of their file

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Return the results in a folder; files that are missing are empty."""
        paths = {name: folder / f"{name}.json" for name in STEPS}
        steps = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        return cls(read_lines(folder / "checks.jsonl"), read_lines(folder / "settings.jsonl"), steps)

    def environments(self) -> list[dict]:
        """Return the environments of all files."""
        lines = [line["environment"] for line in self.checks + self.settings if "environment" in line]
        return lines + [report["environment"] for report in self.steps.values()]


def main() -> None:
    """Print the tables, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default="results/gpu", metavar="DIR", help="the files of gpu.sh")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose figures are replaced")
    options = parser.parse_args()
    results = Results.read(options.folder)
    text = tables(results)
    try:
        if options.page:
            message = "the figures are those of a rehearsal on a CPU; leave the flag out"
            require(not is_rehearsal(results), "page", options.page, message)
            write(options.page, text)
    except ConfigurationError as error:
        refuse(error)
    print(text, end="")


def write(page: Path, text: str) -> None:
    """Replace the figures in a page. Raises: ConfigurationError without the two marks in it."""
    content = page.read_text()
    start, end = MARKS
    require(content.count(start) == content.count(end) == 1, "page", page, f"needs the lines {' and '.join(MARKS)}")
    before, _, rest = content.partition(start)
    page.write_text(before + start + text + end + rest.partition(end)[2])


def is_rehearsal(results: Results) -> bool:
    """Return whether any figure is from a CPU."""
    return any(environment["device"] == "cpu" for environment in results.environments())


def tables(results: Results) -> str:
    """Return all tables as Markdown."""
    environments = results.environments()
    if not environments:
        return NOTHING
    parts = [REHEARSAL] if is_rehearsal(results) else []
    lines = dict.fromkeys(environment_line(environment) for environment in environments)
    states = [f"{name} {value}" for name, value in (environments[-1]["gpu"] or {}).items()]
    parts += ["\n".join(f"* {line}" for line in (*lines, *([", ".join(states)] if states else []))) + "\n"]
    sections = {
        "Checks": check_table(results.checks),
        "Gates": gate_table(results),
        "Steps": markdown_table(STEP_COLUMNS, step_rows(results.steps)) if results.steps else "",
        "Settings": markdown_table(SETTING_COLUMNS, setting_rows(results.settings)) if results.settings else "",
    }
    return "\n".join([*parts, *(f"### {title}\n\n{text}" for title, text in sections.items() if text)])


def check_table(lines: list[dict]) -> str:
    """Return how many checks had each outcome, and a table of those that did not pass."""
    checks = [line for line in lines if "check" in line]
    if not checks:
        return ""
    outcomes = [check["outcome"] for check in checks]
    seconds = sum(check.get("seconds", 0) for check in checks)
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    rows = [(check["check"], check["outcome"], check["reason"]) for check in checks if check["outcome"] != "passed"]
    table = markdown_table(("check", "outcome", "reason"), rows) if rows else ""
    return f"{counts}; {seconds:.0f} s\n" + (f"\n{table}" if table else "")


def gate_table(results: Results) -> str:
    """Return the table of gates: median, bound and verdict by size."""
    gates: dict[str, dict[str, str]] = {}
    for size, what, row in all_gates(results):
        gates.setdefault(what, {})[size] = verdict(row)
    sizes = [size for size in STEPS if any(size in cells for cells in gates.values())]
    rows = [(what, *(cells.get(size, "") for size in sizes)) for what, cells in gates.items()]
    return markdown_table(("gate", *sizes), rows) if rows else ""


def all_gates(results: Results) -> Iterator[tuple[str, str, dict]]:
    """Yield size, description and gate: those of the steps, the targets and the peak memory."""
    for size, report in results.steps.items():
        for row in report["gates"]:
            yield size, row["what"], row
            if row["what"].endswith("util_ceiling") and size in GPU:
                yield size, f"{row['what']}, target", gate(row["what"], row["values"], at_least=GPU[size].target)
    for line in results.settings:
        size = line["flags"].split()[1] if line.get("set") == "memory" and "memory_bytes" in line else None
        if size in GPU:
            bound = GPU[size].memory / 1e9
            yield size, "peak GB at 16 samples", gate("peak GB", [line["memory_bytes"] / 1e9], at_most=bound)


def verdict(row: dict) -> str:
    """Return the cell of a gate: its median, its bound, and whether that is met."""
    value = f"{row['median']:.3g}"
    if row["passed"] is None:
        return value
    bound = f"<= {row['at_most']:.3g}" if row["at_least"] is None else f">= {row['at_least']:.3g}"
    return f"{value}, {bound}: {'met' if row['passed'] else '**missed**'}"


def step_rows(steps: dict[str, dict]) -> Iterator[tuple]:
    """Yield the rows of all implementations of all sizes."""
    for size, report in steps.items():
        for name, figures in report["figures"].items():
            memory = (figures["memory_bytes"] or {}).get("step")
            yield (
                size,
                name,
                f"{1e3 * tokens_per_step(report) / figures['tokens_per_second']:.1f}",
                f"{figures['tokens_per_second']:,.0f}",
                *(cell(figures[key], ".3f") for key in ("mfu_palm", "util_ceiling", "util_exec")),
                cell(figures["step_over_floor"], ".2f"),
                cell(memory and memory / 1e9, ".1f"),
            )


def tokens_per_step(report: dict) -> int:
    """Return the tokens of a step of training_step/."""
    settings = report["settings"]
    return settings["micro_batches"] * settings["micro_batch_size"] * settings["seq_length"]


def setting_rows(lines: Iterable[dict]) -> Iterator[tuple]:
    """Yield the rows of the settings; "relative" is the speed over that of the first setting of the set."""
    first: dict[str, float] = {}
    for line in lines:
        if "failed" in line:
            yield f"`{line['flags']}`", line["failed"], "", "", ""
        elif "flags" in line:
            speed = line["tokens_per_second"]
            relative = speed / first.setdefault(line["set"], speed)
            memory, start = line["memory_bytes"] / 1e9, line["first_step_seconds"]
            yield f"`{line['flags']}`", f"{speed:,.0f}", f"{relative:.2f}", f"{memory:.1f}", f"{start:.1f}"


def cell(value: float | None, format_spec: str) -> str:
    """Return a number as a cell, "-" for None."""
    return "-" if value is None else format(value, format_spec)


if __name__ == "__main__":
    main()
