#!/usr/bin/env python3
"""Write local probes for lm-eval from held-out documents: the next line, the closing bracket, the indentation.

    python tools/probe_tasks.py --data data/quickstart/validation --output-dir runs/probes
    python -m megatron.scoring.lm_eval_cli --pretrained runs/mdm --include_path runs/probes --tasks probes

The group `probes` has the tasks probes_cloze (four lines), probes_brackets and probes_indentation (two choices), of
which those without an item are left out. The table has the accuracies of three baselines that see no context: a random
choice, the longest, and that of the highest unigram likelihood. docs/scoring.md defines the items.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.data.copy_documents import Source
from megatron.data.inspection.excerpts import TokenizerFlags, open_tokenizer
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.scoring.probe_tasks import GROUP, TASKS, ProbeOptions, write_probes


def main() -> None:
    """Write the tasks of the command line, and print their sizes and baselines."""
    configure_logging()
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    for section in (ProbeOptions, TokenizerFlags):
        add_section(parser, section, {})
    try:
        namespace = parser.parse_known(sys.argv[1:])
        options, source = build(ProbeOptions, namespace), Source.open(namespace.data)
        probes = write_probes(source, open_tokenizer(source, build(TokenizerFlags, namespace)), options)
    except ConfigurationError as error:
        fail(error, 2)
    except OSError as error:
        fail(error, 1)
    except stop_signals.Interrupted as signal:
        fail("interrupted; start the same command again", signal.exit_code)
    print(f"{'task':20} {'items':>5} {'chance':>7} {'longest':>8} {'unigram':>8}")
    for probe in probes:
        print(f"{probe.name:20} {len(probe.items):5} {probe.chance:7.3f} {probe.longest:8.3f} {probe.unigram:8.3f}")
    absent = [task for task in TASKS if f"{GROUP}_{task}" not in {probe.name for probe in probes}]
    if absent:
        print(f"no item, left out: {', '.join(absent)}")


def fail(error: object, code: int) -> None:
    """Print an error and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    stop_signals.run_tool(main)
