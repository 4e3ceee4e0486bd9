"""What goes wrong with lm-eval and its tasks before anything is scored, in one line."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron.errors import ConfigurationError

ROOMS = ("lm_eval.tasks", "lm_eval.api.task", "lm_eval.config", "datasets")  # which find tasks and read their data


def leave_without_lm_eval(missing: ImportError) -> NoReturn:
    """End the program where lm-eval cannot be imported."""
    sys.exit(
        print(f"error: scoring needs the package lm-eval ({missing}); bash install.sh --with-eval", file=sys.stderr)
        or 2
    )


def check_include_path(folder: str | None) -> None:
    """Raise ConfigurationError where the folder of further tasks is none: lm-eval would know its tasks by no name."""
    if folder is not None and not Path(folder).is_dir():
        raise ConfigurationError(f"--include_path {folder}: is no folder; name one that holds tasks as YAML files")


@contextmanager
def faults_of_tasks(tasks: Sequence[str]) -> Iterator[None]:
    """Raise ConfigurationError where tasks, or what they read, cannot be had; other errors stay what they are."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        if not _of_tasks(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"--tasks {','.join(map(str, tasks)) or '-'}: {reason}; name tasks that `ls tasks` lists, whose data this "
            "machine has or can fetch"
        ) from error


def _of_tasks(error: BaseException) -> bool:
    """Return whether an error comes from finding tasks or their data: those rooms were in, and no model of ours."""
    names, trace = [], error.__traceback__
    while trace:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(name.startswith(ROOMS) for name in names) and "megatron.evaluation.language_model" not in names
