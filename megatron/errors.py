"""The one exception for what a user can fix: a flag, a file, a folder."""

from collections.abc import Sequence


class ConfigurationError(ValueError):
    """A user's mistake in one line: the flag and its value, the rule it breaks, what to do.

    Several mistakes at once, as of a sweep, are `details`, a line each. Line breaks in names of files are escaped.
    Entry points print the message without a traceback and exit with code 2.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__("\n  ".join("\\n".join(line.splitlines()) for line in (message, *details)))
