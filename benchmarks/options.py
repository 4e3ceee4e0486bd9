"""The command line of a benchmark: flags from a dataclass, help from its module docstring, one-line errors."""

import sys

from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.errors import ConfigurationError


def read_options(section: type, description: str):
    """Return the `section` parsed from the command line; exits with code 2 if it is invalid."""
    parser = Parser(description=description, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(parser, section, {})
    try:
        return build(section, parser.parse_known(sys.argv[1:]))
    except ConfigurationError as error:
        refuse(error)


def refuse(error: ConfigurationError) -> None:
    """Print the error in one line and exit with code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
