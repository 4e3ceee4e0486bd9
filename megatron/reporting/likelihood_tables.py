"""Records of tools/likelihoods.py as text."""


def table(record: dict) -> str:
    """Return the record as text: one table per set, and a legend of the columns."""
    signs = {"exact": "", "upper": "<= ", "lower": ">= "}
    lines = [f"{record['run']} step {record['iteration']}, {record['objective_name']}"]
    for name, results in record["sets"].items():
        rows = [[f"{name} ({results['windows']} windows)", "nats per token", "difference", "passes", "seconds"]]
        for result in results["likelihoods"]:
            loss = f"{signs[result['kind']]}{result['loss']:.4f}" + _error(result["data_se"])
            loss += f" (mc {result['mc_se']:.4f})" if result["mc_se"] else ""
            difference = f"{result['difference']:+.4f}" + _error(result["difference_se"])
            rows.append([result["name"], loss, difference, str(result["passes"]), f"{result['seconds']:.1f}"])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)]
    lines.append("")
    lines.append(
        "±: standard error over documents, of the difference to the first line paired by document. chain is exact"
    )
    lines.append("for the policy, iwae and the tangent bound are of the mixture over all orders. passes: of a window.")
    return "\n".join(lines)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
