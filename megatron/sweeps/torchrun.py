"""torchrun that exits with the code of the rank that failed first: torchrun itself turns every code into 1.

    python megatron/sweeps/torchrun.py OPTIONS_OF_TORCHRUN SCRIPT ARGUMENTS

A caller can then tell a mistake (2) and a locked run (75) from a failure that may pass.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(arguments: list[str]) -> int:
    """Run torchrun; return 0, the exit code of the rank that failed first, or 128 + the number of a signal."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # negative: the signal that killed the rank
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
