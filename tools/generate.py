#!/usr/bin/env python3
"""Generate text with a training run: continue a prompt, or fill the gaps of a text.

    python tools/generate.py runs/ar --prompt "def main(" --max-new-tokens 64
    python tools/generate.py runs/ar --prompt-file prompts.jsonl --temperature 0.8 --top-p 0.95 --output texts.jsonl
    python tools/generate.py runs/mdm --prompt "def main(" --max-new-tokens 64 --steps 16 --block-length 16
    python tools/generate.py runs/mdm --infill "def double(x): return {{8}}" --show-steps
    python tools/generate.py runs/mdm --prompt "The " --gap 12 --suffix " of the file." --temperature 1 --num-samples 4

Runs of --objective ar and dual generate one token after another. Runs of mdm append [MASK] tokens to the prompt and
fill them: each step is a forward pass over the whole text and fills the positions that --order ranks first. Fewer
--steps than tokens are faster and worse, since the tokens of one step are sampled independently. Runs of mdm also fill
gaps: {{8}} is a gap of 8 tokens.

Texts are printed with their prompts; --output also writes them to a file. A text ends before the end of its document.
Prompts are used unchanged, line ends included; in bash a line end is written $'like\\nthis'.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.training.launcher import configure_logging, report_error

# isort: split
# OMP_WAIT_POLICY is set by the import above and must precede torch
from tqdm import tqdm

from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.errors import ConfigurationError
from megatron.generation.requests import Request, check, max_generated_tokens, read_request
from megatron.generation.sampling import Sampling
from megatron.generation.texts import write_texts
from megatron.parallel.launch import check_alone
from megatron.training.load_run import open_trained
from megatron.training.run_folder import prepare_output, write_records

logger = logging.getLogger(__name__)


def print_step(line: str) -> None:
    """Print a line of --show-steps."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command; exit with code 2 for an error of the user, 1 for one of files."""
    configure_logging()
    try:
        check_alone()
        work(sys.argv[1:])
    except (ConfigurationError, OSError) as error:
        sys.exit(report_error(error, 2 if isinstance(error, ConfigurationError) else 1))


def work(arguments: list[str]) -> None:
    """Generate, print and write the texts of a command line.

    Raises: ConfigurationError for wrong flags, runs and prompts.
    """
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a folder that --save wrote, or a checkpoint in it")
    for section in (Request, Sampling):
        add_section(parser, section, {})
    namespace = parser.parse_known(arguments)
    request = build(Request, namespace)
    sampling = build(Sampling, namespace)
    if namespace.run is None:
        raise ConfigurationError("RUN: required and not given; name a folder that --save wrote")
    trained = open_trained(namespace.run, request.checkpoint)
    prompts = read_request(request)
    typed_flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    check(trained, request, prompts, sampling, typed_flags=typed_flags)
    if request.output:
        prepare_output(Path(request.output))  # fails before the generation, not after it
    total = max_generated_tokens(prompts, request, sampling)
    # shown after 2 seconds and on a terminal only
    with tqdm(total=total, unit="token", delay=2, disable=True if request.show_steps else None) as bar:
        records = write_texts(trained, request, prompts, sampling, advance=bar.update, show=print_step)
    for number, record in enumerate(records, start=1):
        if len(records) > 1:
            print(f"--- text {number} of {len(records)}")
        print(record["whole"])
    if request.output:
        write_records(Path(request.output), records)


if __name__ == "__main__":
    stop_signals.run_tool(main)
