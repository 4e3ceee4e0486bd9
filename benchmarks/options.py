"""The command line of a benchmark: flags from a dataclass, help as its module writes it, mistakes in one line."""

import sys

from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.errors import ConfigurationError


def read_options(section: type, description: str):
    """Return the `section` that the command line describes; leave with 2 where it cannot."""
    parser = Parser(description=description, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(parser, section, {})
    try:
        return build(section, parser.parse_known(sys.argv[1:]))
    except ConfigurationError as error:
        refuse(error)


def refuse(error: ConfigurationError) -> None:
    """Say what is wrong with the command line and leave with 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
