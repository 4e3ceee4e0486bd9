"""Downstream scores along a run: every checkpoint under lm-eval."""

from dataclasses import asdict
from pathlib import Path

from megatron.errors import ConfigurationError
from megatron.scoring.lm_eval_adapter import MegatronLM
from megatron.scoring.lm_eval_arguments import Source
from megatron.scoring.lm_eval_errors import check_include_path, faults_of_tasks
from megatron.scoring.requests import Scoring
from megatron.training.checkpoint_store import CheckpointStore, read_meta


def checkpoints(run: str) -> list[Path]:
    """Return the folders of the intact checkpoints of a run, oldest first; damaged ones are logged and left out.

    Raises: ConfigurationError where none is left.
    """
    intact = CheckpointStore.of_run(Path(run)).intact()
    if not intact:
        raise ConfigurationError(f"{run}: has no intact checkpoint; name a folder that --save wrote")
    return intact


def score_checkpoints(
    run: str,
    tasks: list[str],
    scoring: Scoring,
    *,
    include_path: str | None,
    limit: float | None,
    cache: Path | None = None,
    bootstrap: int = 1000,
) -> dict:
    """Return lm-eval's results for every checkpoint of a run: {"run", "points": [{"epoch", ..., "results"}]}.

    The epoch of an imported run, whose data are unknown, is None. Answers are cached under `cache`. All ranks share the
    requests; only rank 0 returns points.

    Raises: ConfigurationError for unknown tasks, and tasks whose data cannot be loaded.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    check_include_path(include_path)
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigurationError(f"--tasks {unknown[0]}: is unknown to lm-eval; `lm-eval ls tasks` lists them")
    points = []
    for folder in checkpoints(run):
        source = asdict(Source(pretrained=str(folder)))
        model = MegatronLM(**source, **asdict(scoring), use_cache=cache)
        settings = {"limit": limit, "bootstrap_iters": bootstrap, "log_samples": False}
        with faults_of_tasks(tasks):
            evaluation = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **settings)
        if evaluation is None:  # not rank 0
            continue
        unique_tokens = model.trained.recorded["unique_tokens"]
        meta = read_meta(folder)
        tokens = meta["consumed_samples"] * model.seq_length
        points.append(
            {
                "iteration": meta["iteration"],
                "consumed_samples": meta["consumed_samples"],
                "epoch": tokens / unique_tokens if unique_tokens else None,
                "model": model.get_model_info(),
                "results": evaluation["results"],  # pyright: ignore[reportTypedDictNotRequiredAccess]
            }
        )
    return {"run": run, "tasks": tasks, "scoring": asdict(scoring), "points": points}
