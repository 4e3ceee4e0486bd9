#!/usr/bin/env python3
"""Export a trained run to Hugging Face transformers, and import transformers or Megatron-DeepSpeed checkpoints.

    python tools/convert_checkpoint.py to-hf runs/mine --output exported/mine
    python tools/convert_checkpoint.py from-hf exported/mine --output runs/again

to-hf: an autoregressive run becomes a LlamaForCausalLM (Qwen3ForCausalLM with --qk-layernorm) that stock transformers
and `lm_eval --model hf` load; masked diffusion becomes a EuroBertForMaskedLM, which computes the same as a
bidirectional Llama. The folder also holds the tokenizer, a model card and what from-hf needs to restore the run. A run
that stock classes cannot compute exactly is refused with the reason.

from-hf: an export is restored as its run, at step 0 with a fresh optimizer. Other Llama, Qwen3 and EuroBert folders
become a run too; a setting that our model does not support is refused by name. Evaluate it or continue training:

    python pretrain_gpt.py --skip-train --load runs/again
    python pretrain_gpt.py ... --load runs/again --save runs/longer

from-megatron-deepspeed: pipeline layer files, of any tensor-parallel size. They do not hold the model's sizes, so the
model flags follow:

    python tools/convert_checkpoint.py from-megatron-deepspeed global_step1000 --output runs/theirs \\
        --model-size 140M --objective ar --tokenizer-type NullTokenizer --vocab-size 50256
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.training.launcher import configure_logging, report_error

# isort: split
# importing training.launcher sets OMP_WAIT_POLICY, which must happen before torch is imported
from megatron.convert.export import DTYPES, export
from megatron.convert.import_huggingface import import_folder
from megatron.convert.megatron_deepspeed import import_checkpoint
from megatron.errors import ConfigurationError
from megatron.parallel.launch import check_alone
from megatron.training.load_run import open_trained


def main() -> None:
    """Run the conversion of the command line; exits with code 2 after a user's mistake, 1 after an I/O error."""
    configure_logging()
    options, flags = parser().parse_known_args()
    try:
        check_alone()
        for line in options.convert(options, flags):
            print(line)
    except (ConfigurationError, OSError) as error:
        sys.exit(report_error(error, 2 if isinstance(error, ConfigurationError) else 1))
    except KeyboardInterrupt:
        sys.exit(print("error: interrupted; nothing was written", file=sys.stderr) or 130)


def parser() -> argparse.ArgumentParser:
    """Return the parser, with a subcommand for each conversion."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    conversions = "{to-hf,from-hf,from-megatron-deepspeed}"
    subparsers = result.add_subparsers(required=True, metavar=conversions, title="conversions, each with --help")
    _to_hf(subparsers)
    _from_hf(subparsers)
    _from_megatron_deepspeed(subparsers)
    return result


def _to_hf(subparsers) -> None:
    command = subparsers.add_parser("to-hf", help="export a run to a transformers folder", allow_abbrev=False)
    command.add_argument("run", metavar="RUN", help="a run folder (--save), or a checkpoint in it")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    command.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="the newest checkpoint, or the one with the lowest loss on the first validation set (default: latest)",
    )
    command.add_argument(
        "--average", action="store_true", help="export the averaged weights instead of the model weights"
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of one weight file (default: 5GB)"
    )
    command.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer.json or tokenizer.model, if the file that the run used has moved",
    )

    def convert(options, flags: list[str]) -> list[str]:
        refuse(flags)
        tokenizer = ["--tokenizer-model", options.tokenizer_model] if options.tokenizer_model else []
        trained = open_trained(options.run, options.checkpoint, tokenizer)
        return export(
            trained,
            options.output,
            average=options.average,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
        )

    command.set_defaults(convert=convert)


def _from_hf(subparsers) -> None:
    command = subparsers.add_parser("from-hf", help="import a transformers folder as a run", allow_abbrev=False)
    command.add_argument("folder", type=Path, metavar="DIR", help="local folder with config.json and *.safetensors")
    command.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="run folder to write; must not exist"
    )
    command.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens per sample, unless the folder is an export of a run (default: the model's maximum)",
    )

    def convert(options, flags: list[str]) -> list[str]:
        refuse(flags)
        return import_folder(options.folder, options.output, options.seq_length)

    command.set_defaults(convert=convert)


def _from_megatron_deepspeed(subparsers) -> None:
    command = subparsers.add_parser(
        "from-megatron-deepspeed",
        help="import a Megatron-DeepSpeed checkpoint as a run",
        description="Further flags of pretrain_gpt.py describe what the files do not hold: the model "
        "(--model-size, or --num-layers, --hidden-size, ..., --no-swiglu, --add-bias-linear), --objective ar or mdm, "
        "the tokenizer (--tokenizer-type GPT2BPETokenizer --vocab-file FILE --merge-file FILE, or --tokenizer-type "
        "NullTokenizer --vocab-size 50256 for ids 0 to 50256, the last of which ends a document), and --seq-length.",
        allow_abbrev=False,
    )
    command.add_argument(
        "folder", type=Path, metavar="DIR", help="global_stepN, or the folder whose file latest names it"
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="run folder to write; must not exist"
    )
    command.add_argument(
        "--qkv-by-head",
        action="store_true",
        help="rows of query_key_value are grouped by head, as Megatron-DeepSpeed wrote them before December 2024 "
        "(676a482)",
    )

    def convert(options, flags: list[str]) -> list[str]:
        return import_checkpoint(options.folder, options.output, flags, options.qkv_by_head)

    command.set_defaults(convert=convert)


def refuse(flags: list[str]) -> None:
    """Check that no unknown flags are left.

    Raises: ConfigurationError if there are.
    """
    if flags:
        raise ConfigurationError(f"{flags[0]}: unknown flag of this conversion; --help after its name lists the flags")


if __name__ == "__main__":
    stop_signals.run_tool(main)
