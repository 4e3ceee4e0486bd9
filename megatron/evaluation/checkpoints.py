"""Downstream scores along a run: its checkpoints under lm-eval, one after another, and a plot against epochs."""

import logging
from dataclasses import asdict
from pathlib import Path

from megatron.errors import ConfigurationError
from megatron.evaluation.language_model import MegatronLM, Source
from megatron.evaluation.lm_eval_errors import check_include_path, faults_of_tasks
from megatron.evaluation.requests import Scoring
from megatron.figures import add_legend, literal, pyplot, save_png
from megatron.training.checkpoint import complete, damage
from megatron.training.run_folder import read_json

logger = logging.getLogger(__name__)


def checkpoints(run: str) -> list[Path]:
    """Return the folders of the sound checkpoints of a run, oldest first, and name those that are damaged.

    Raises ConfigurationError where there is none.
    """
    sound = []
    for folder in complete(Path(run) / "checkpoints"):
        fault = damage(folder)
        if fault is None:
            sound.append(folder)
        else:
            logger.warning("checkpoint %s is damaged (%s) and left out", folder, fault)
    if not sound:
        raise ConfigurationError(f"{run}: holds no sound checkpoint; name a folder that --save wrote")
    return sound


def score_checkpoints(
    run: str,
    tasks: list[str],
    scoring: Scoring,
    include_path: str | None,
    limit: float | None,
    cache: Path | None = None,
    bootstrap: int = 1000,
) -> dict:
    """Return what lm-eval finds for every checkpoint of a run: {"run", "points": [{"epoch", ..., "results"}]}.

    Answers are kept in `cache`. Of several processes, which share the work, the first has the points. Raises
    ConfigurationError for tasks that are unknown, or whose data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    check_include_path(include_path)
    manager, points = TaskManager(include_path=include_path), []
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigurationError(f"--tasks {unknown[0]}: is unknown to lm-eval; `lm-eval ls tasks` lists them")
    for folder in checkpoints(run):
        source = asdict(Source(pretrained=str(folder)))
        model = MegatronLM(**source, **asdict(scoring), use_cache=cache)
        settings = {"limit": limit, "bootstrap_iters": bootstrap, "log_samples": False}
        with faults_of_tasks(tasks):
            found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, **settings)
        if found is None:
            continue
        recorded, meta = model.trained.recorded, read_json(folder / "meta.json")
        tokens = meta["consumed_samples"] * model.seq_length
        points.append(
            {
                "iteration": meta["iteration"],
                "consumed_samples": meta["consumed_samples"],
                "epoch": tokens / recorded["unique_tokens"],
                "model": model.get_model_info(),
                "results": found["results"],
            }
        )
    return {"run": run, "tasks": tasks, "scoring": asdict(scoring), "points": points}


def plot(record: dict, path: Path) -> None:
    """Draw the first metric of each task against epochs, with its error over documents, as a PNG file."""
    figure, axes = pyplot().subplots(figsize=(6, 4.2))
    epochs, names = [point["epoch"] for point in record["points"]], []
    for task in record["points"][0]["results"]:
        metric = first_metric(record["points"][0]["results"][task])
        values = [point["results"][task][metric] for point in record["points"]]
        name, kind = metric.split(",")
        errors = [point["results"][task].get(f"{name}_stderr,{kind}") for point in record["points"]]
        errors = [error if isinstance(error, float) else 0.0 for error in errors]
        names.append((axes.errorbar(epochs, values, yerr=errors, fmt="o-", capsize=3), f"{task} {name}"))
    axes.set(xlabel="epochs", ylabel="score (± over documents)")
    literal(axes.set_title(record["run"]))
    axes.grid(alpha=0.3)
    add_legend(axes, names)
    save_png(figure, path)


def first_metric(results: dict) -> str:
    """Return the name of the first metric of a task, which is a number and no error of one."""
    return next(name for name, value in results.items() if "," in name and "_stderr" not in name and value is not None)
