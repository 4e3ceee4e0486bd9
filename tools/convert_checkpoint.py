#!/usr/bin/env python3
"""Turn a trained run into a folder of Hugging Face transformers, and checkpoints of others into a run.

    python tools/convert_checkpoint.py to-hf runs/mine --output exported/mine
    python tools/convert_checkpoint.py from-hf exported/mine --output runs/again

to-hf: an autoregressive run becomes a LlamaForCausalLM (Qwen3ForCausalLM with --qk-layernorm) that plain transformers
and `lm_eval --model hf` load; masked diffusion becomes a EuroBertForMaskedLM, which computes the same as a
bidirectional Llama. Tokenizer, model card and what the way back needs lie beside it. What stock classes would
read otherwise than it was trained is refused with the reason.

from-hf: an export comes back as the run it was, at step 0 with a fresh optimizer. Llama-, Qwen3- and EuroBert-shaped
folders of others become a run too; what our network cannot express is refused by name. Evaluate it or go on training:

    python pretrain_gpt.py --skip-train --load runs/again
    python pretrain_gpt.py ... --load runs/again --save runs/longer

from-megatron-deepspeed: the layer files of its pipeline, of any tensor parallelism. They do not tell the sizes, so the
flags of the network come behind:

    python tools/convert_checkpoint.py from-megatron-deepspeed global_step1000 --output runs/theirs \\
        --model-size 140M --objective ar --tokenizer-type NullTokenizer --vocab-size 50256
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.main import configure_logging, say

# isort: split
# libgomp has been told how to wait: before that nothing may load torch
from megatron.convert.export import DTYPES, export
from megatron.convert.import_huggingface import import_folder
from megatron.convert.megatron_deepspeed import import_checkpoint
from megatron.errors import ConfigurationError
from megatron.parallel.launch import check_alone
from megatron.training.load_run import open_trained


def main() -> None:
    configure_logging()
    options, flags = parser().parse_known_args()
    try:
        check_alone()
        for line in options.convert(options, flags):
            print(line)
    except (ConfigurationError, OSError) as error:
        sys.exit(say(error, 2 if isinstance(error, ConfigurationError) else 1))
    except KeyboardInterrupt:
        sys.exit(print("error: interrupted; nothing was written", file=sys.stderr) or 130)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    conversions = "{to-hf,from-hf,from-megatron-deepspeed}"
    ways = result.add_subparsers(required=True, metavar=conversions, title="conversions, each with --help")
    _to_hf(ways)
    _from_hf(ways)
    _from_megatron_deepspeed(ways)
    return result


def _to_hf(ways) -> None:
    way = ways.add_parser("to-hf", help="write a run as a folder of transformers", allow_abbrev=False)
    way.add_argument("run", metavar="RUN", help="a folder that --save wrote, or a checkpoint in it")
    way.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    way.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="the newest one, or that of the lowest loss on the first validation set (default: latest)",
    )
    way.add_argument(
        "--average", action="store_true", help="the average of the weights that the run kept, not the weights"
    )
    way.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    way.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights (default: 5GB)")
    way.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer.json or tokenizer.model, where it is no longer where the run found it",
    )

    def convert(options, flags: list[str]) -> list[str]:
        refuse(flags)
        tokenizer = ["--tokenizer-model", options.tokenizer_model] if options.tokenizer_model else []
        trained = open_trained(options.run, options.checkpoint, tokenizer)
        asked = {"average": options.average, "dtype": options.dtype, "shard": options.max_shard_size}
        return export(trained, options.output, **asked)

    way.set_defaults(convert=convert)


def _from_hf(ways) -> None:
    way = ways.add_parser("from-hf", help="make a run of a folder of transformers", allow_abbrev=False)
    way.add_argument("folder", type=Path, metavar="DIR", help="with config.json and *.safetensors, on this machine")
    way.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder to write; must not exist")
    way.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens of a sample, where the folder is no export of a run (default: all positions of the model)",
    )

    def convert(options, flags: list[str]) -> list[str]:
        refuse(flags)
        return import_folder(options.folder, options.output, options.seq_length)

    way.set_defaults(convert=convert)


def _from_megatron_deepspeed(ways) -> None:
    way = ways.add_parser(
        "from-megatron-deepspeed",
        help="make a run of a checkpoint of Megatron-DeepSpeed",
        description="Behind --output come flags of pretrain_gpt.py that say what the files do not: the network "
        "(--model-size, or --num-layers, --hidden-size, ..., --no-swiglu, --add-bias-linear), --objective ar or mdm, "
        "the tokenizer (--tokenizer-type GPT2BPETokenizer --vocab-file FILE --merge-file FILE, or --tokenizer-type "
        "NullTokenizer --vocab-size 50256 for ids 0 to 50256, the last of which ends a document), and --seq-length.",
        allow_abbrev=False,
    )
    way.add_argument("folder", type=Path, metavar="DIR", help="global_stepN, or the folder whose file latest names it")
    way.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder to write; must not exist")
    way.add_argument(
        "--qkv-by-head",
        action="store_true",
        help="query_key_value holds query, key and value of each head together, as Megatron-DeepSpeed wrote it before "
        "December 2024 (676a482)",
    )

    def convert(options, flags: list[str]) -> list[str]:
        return import_checkpoint(options.folder, options.output, flags, options.qkv_by_head)

    way.set_defaults(convert=convert)


def refuse(flags: list[str]) -> None:
    if flags:
        raise ConfigurationError(
            f"{flags[0]}: belongs to no flag of this conversion; --help behind its name lists them"
        )


if __name__ == "__main__":
    main()
