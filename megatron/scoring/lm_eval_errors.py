"""Errors of lm-eval and its tasks as one line: a missing package, unknown tasks, data that cannot be loaded."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron.errors import ConfigurationError
from megatron.parallel.launch import world_size

TASK_MODULES = ("lm_eval.tasks", "lm_eval.api.task", "lm_eval.config", "datasets")  # find tasks and load their data
NO_DOCUMENT = "did not find any docs"  # lm-eval's error of a task without documents, and of a rank without its share


def leave_without_lm_eval(missing: ImportError) -> NoReturn:
    """Exit with code 2 and one line, where lm-eval cannot be imported; raise other import errors again."""
    if (missing.name or "").startswith("megatron"):
        raise missing
    print(f"error: scoring needs the package lm-eval ({missing}); bash install.sh --with-eval", file=sys.stderr)
    sys.exit(2)


def check_include_path(folder: str | None) -> None:
    """Check the folder of additional tasks; lm-eval would only report its tasks as unknown.

    Raises: ConfigurationError where it is not a folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigurationError(f"--include_path {folder}: is not a folder; name one with tasks as YAML files")


@contextmanager
def faults_of_tasks(tasks: Sequence[str]) -> Iterator[None]:
    """Turn errors of finding tasks and loading their data into ConfigurationError; other errors pass unchanged."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        if not _is_task_error(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "name tasks that `ls tasks` lists, with data that this machine has or can download"
        if NO_DOCUMENT in reason and world_size() > 1:
            reason = f"a task has fewer documents than the {world_size()} ranks"
            remedy = "start fewer, or give a higher --limit"
        raise ConfigurationError(f"--tasks {','.join(map(str, tasks)) or '-'}: {reason}; {remedy}") from error


def _is_task_error(error: BaseException) -> bool:
    """Return whether the traceback passes through TASK_MODULES and not through our model."""
    names, trace = [], error.__traceback__
    while trace:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(name.startswith(TASK_MODULES) for name in names) and "megatron.scoring.lm_eval_adapter" not in names
