"""The one exception for what a user can fix: a flag, a file, a folder."""


class ConfigurationError(ValueError):
    """A user's mistake in one line: the flag and its value, the rule it breaks, what to do.

    Entry points print the message without a traceback and exit with code 2. Line breaks in names of files are escaped.
    """

    def __init__(self, message: str):
        super().__init__("\\n".join(message.splitlines()))
