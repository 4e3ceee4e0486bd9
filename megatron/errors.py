"""The one exception for what a user can put right: a flag, a file, a folder."""


class ConfigurationError(ValueError):
    """A user's mistake, told in one line: what was asked, which rule it breaks, what to do.

    Entry points print the message without a traceback and leave with exit code 2.
    """
