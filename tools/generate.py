#!/usr/bin/env python3
"""Write text with a trained run: go on from a prompt, or fill the gaps of a text.

    python tools/generate.py runs/ar --prompt "def main(" --max-new-tokens 64
    python tools/generate.py runs/ar --prompt-file prompts.jsonl --temperature 0.8 --top-p 0.95 --output texts.jsonl
    python tools/generate.py runs/mdm --prompt "def main(" --max-new-tokens 64 --steps 16 --block-length 16
    python tools/generate.py runs/mdm --infill "def double(x): return {{8}}" --show-steps
    python tools/generate.py runs/mdm --prompt "The " --gap 12 --suffix " of the file." --temperature 1 --num-samples 4

Runs of --objective ar and dual write one token after another. Runs of mdm put an answer of masks behind the prompt and
fill it in: each step reads the whole and fills the places that --order puts first. Fewer --steps than tokens are faster
and worse, since what is filled in one step is chosen independently. They also fill gaps: {{8}} is one of 8 tokens.

Texts are printed, prompts included; --output keeps them for a machine. Nothing is printed behind the end of a document.
What is given is taken as it stands, its line ends too; in bash a line end is typed $'like\\nthis'.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.main import configure_logging, say

# isort: split
# libgomp has been told how to wait: before that nothing may load torch
from tqdm import tqdm

from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.errors import ConfigurationError
from megatron.evaluation.sampling import Sampling
from megatron.evaluation.texts import Request, check, read_request, tokens_to_come, write_records, write_texts
from megatron.parallel.launch import check_alone
from megatron.training.load_run import open_trained
from megatron.training.run_folder import writing

logger = logging.getLogger(__name__)


def main() -> None:
    configure_logging()
    try:
        check_alone()
        work(sys.argv[1:])
    except (ConfigurationError, OSError) as error:
        sys.exit(say(error, 2 if isinstance(error, ConfigurationError) else 1))


def work(arguments: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a folder that --save wrote, or a checkpoint in it")
    for section in (Request, Sampling):
        add_section(parser, section, {})
    namespace = parser.parse_known(arguments)
    request, sampling = build(Request, namespace), build(Sampling, namespace)
    if namespace.run is None:
        raise ConfigurationError("RUN: required and not given; name a folder that --save wrote")
    trained = open_trained(namespace.run, request.checkpoint)
    asked = read_request(request)
    check(trained, request, asked, sampling, {word.split("=")[0] for word in arguments if word.startswith("--")})
    if request.output:
        with writing(Path(request.output)):  # before the work, not after it
            Path(request.output).parent.mkdir(parents=True, exist_ok=True)
    total = tokens_to_come(asked, request, sampling)
    # only for work of some length, and only where someone looks
    with tqdm(total=total, unit="token", delay=2, disable=True if request.show_steps else None) as bar:
        records = write_texts(
            trained, request, asked, sampling, bar.update, lambda line: print(line, file=sys.stderr, flush=True)
        )
    for number, record in enumerate(records, start=1):
        if len(records) > 1:
            print(f"--- text {number} of {len(records)}")
        print(record["whole"])
    if request.output:
        write_records(Path(request.output), records)


if __name__ == "__main__":
    main()
