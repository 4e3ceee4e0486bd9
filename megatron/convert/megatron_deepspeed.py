"""Import pipeline checkpoints of Megatron-DeepSpeed as a run: files layer_XX-model_YY-model_states.pt, YY the tp rank.

layer 01          word_embeddings.weight: the padded vocabulary, sharded by rows
layers 02 .. L+1  the blocks
after them        the final norm, then the head if it is untied; recognised by the tensor names

Format of deepspeedai/Megatron-DeepSpeed at 4efb479 (megatron/model/{gpt_model,transformer}.py), its newest commit, on
which the published system of 2507.15857 is built. A rank's shard of query_key_value holds all queries, then all keys,
then all values; with SwiGLU, dense_h_to_4h holds the gate projection, then the up projection. The files do not hold the
model's sizes; flags give them. The files are pickles, from which only tensors are loaded.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from megatron.config.flags import require
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.folders import check_new, new_folder
from megatron.convert.tokenizer import copy_tokenizer
from megatron.convert.write_imported_run import check_weights, describe_import, fill_tables, model_flags, write_run
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigurationError
from megatron.objectives.registry import can, capabilities
from megatron.training.command_line import parse

FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
REPLICATED = ("input_layernorm", "post_attention_layernorm")
ROW_PARALLEL = {"self_attention.dense": "self_attn.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
EMBEDDING, HEAD, QKV = "word_embeddings.weight", "lm_head.weight", "self_attention.query_key_value.weight"

Layer = list[dict[str, Tensor]]  # the tensors of one layer, by tp rank


def import_checkpoint(path: Path, output: Path, flags: list[str], by_head: bool = False) -> list[str]:
    """Convert the checkpoint `path` to the run folder `output`; return lines that describe the run.

    `path` is a folder of layer files, or one whose file `latest` names it. `flags` are those of pretrain_gpt.py: the
    model, --objective, the tokenizer; `by_head` is as in `read_checkpoint`.

    Raises: ConfigurationError if flags and files do not match, or files are missing or hold more than tensors.
    """
    check_new(output)
    config = parse("ar", [*flags, "--train-samples", "1"])
    model, data, objective = config.model, config.data, config.objective.objective
    message = f"is not an objective that Megatron-DeepSpeed trains; give {can('in_megatron_deepspeed')}"
    require(capabilities(objective).in_megatron_deepspeed, "objective", objective, message)
    message = "does not exist in these files, which hold as many keys as queries; leave it out"
    require(not model.group_query_attention, "group_query_attention", True, message)
    require(not model.qk_layernorm, "qk_layernorm", True, "does not exist in these files; leave it out")
    require(model.num_loops == 1, "num_loops", model.num_loops, "does not exist in these files; leave it out")
    tokenizer = build_tokenizer(
        data.tokenizer_type,
        data.tokenizer_model,
        vocab_size=data.vocab_size,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
    )
    vocabulary = Vocabulary(tokenizer.vocabulary_size)
    weights = read_checkpoint(path, model, vocabulary, by_head)
    mask_row = _mask_row(weights, vocabulary, objective, path)
    weights = fill_tables(weights, model, vocabulary, seed=config.training.seed, mask_row=mask_row)
    recorded = describe_import(config, vocabulary, str(path), "bf16" if config.training.bf16 else "fp32")
    with new_folder(output) as partial:
        recorded["data"] |= copy_tokenizer(tokenizer, partial, output)
        write_run(partial, recorded, weights, config.training.global_batch_size)
    return [
        f"{output}: a run of --objective {objective} over {vocabulary.size:,} ids, at step 0",
        f"to continue training, branch from it with its model flags: --load {output} {model_flags(model)}",
    ]


def read_checkpoint(path: Path, model: ModelConfig, vocabulary: Vocabulary, by_head: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in fp32 by our names; embedding and head keep their number of rows.

    With `by_head`, the rows of query_key_value are grouped by head, [heads, 3, head_size], as Megatron-DeepSpeed wrote
    them before 676a482 (December 2024). The shapes of the two layouts are equal.

    Raises: ConfigurationError if the files do not fit the model.
    """
    folder = _folder(path)
    layers = {number: [_load(file) for file in files] for number, files in _files(folder).items()}
    blocks = [number for number, layer in layers.items() if QKV in layer[0]]
    if len(blocks) != model.num_layers or blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        raise ConfigurationError(
            f"{folder}: holds {len(blocks)} blocks, in layers {', '.join(map(str, blocks)) or 'of other names'}, and "
            f"the model has {model.num_layers}; give its --num-layers, or the missing files"
        )
    weights = {}
    for number, layer in layers.items():
        source = f"{folder}/layer_{number:02d}"
        if number in blocks:
            block = _block(layer, model, source, by_head)
            weights |= {f"layers.{number - blocks[0]}.{name}": tensor for name, tensor in block.items()}
        else:
            weights |= _non_block(layer, source)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    check_weights(weights, model, vocabulary, str(folder))
    return weights


def _folder(path: Path) -> Path:
    """Return the folder of the layer files: `path`, or the subfolder that its file `latest` names."""
    latest = path / "latest"
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    for folder in (path, path / name) if Path(name).name == name else (path,):
        if folder.is_dir() and any(FILE.fullmatch(file.name) for file in folder.iterdir()):
            return folder
    raise ConfigurationError(
        f"{path}: holds no layer_XX-model_YY-model_states.pt, and no file latest that names such a folder; give a "
        "global_stepN folder of Megatron-DeepSpeed's pipeline"
    )


def _files(folder: Path) -> dict[int, list[Path]]:
    """Return the files of each layer, by tp rank.

    Raises: ConfigurationError if a rank lacks one.
    """
    files = {}
    for file in folder.iterdir():
        match = FILE.fullmatch(file.name)
        if match:
            files[int(match[1]), int(match[2])] = file
    numbers = sorted({number for number, _ in files})
    tp_size = max(rank for _, rank in files) + 1
    for number in numbers:
        for rank in range(tp_size):
            if (number, rank) not in files:
                name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                raise ConfigurationError(f"{folder}: has no {name}; give a complete checkpoint")
    return {number: [files[number, rank] for rank in range(tp_size)] for number in numbers}


def _load(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, without executing anything in it."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a checkpoint can raise anything
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigurationError(
            f"{file}: cannot be read as tensors only ({reason}); copy it again, and do not trust a file that holds more"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigurationError(f"{file}: does not hold the tensors of a layer; give a pipeline checkpoint")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}


def _block(layer: Layer, model: ModelConfig, source: str, by_head: bool) -> dict[str, Tensor]:
    """Return the parameters of a block, by our names within a block."""
    parameters = {}
    for name in layer[0]:
        module, _, kind = name.rpartition(".")
        shards = _shards(layer, name, source)
        if module in REPLICATED:
            parameters[name] = shards[0]
        elif module in ROW_PARALLEL:
            parameters[f"{ROW_PARALLEL[module]}.{kind}"] = torch.cat(shards, dim=1) if kind == "weight" else shards[0]
        elif module == "self_attention.query_key_value":
            names = [f"self_attn.{projection}_proj.{kind}" for projection in "qkv"]
            if by_head:
                shards = [_ungroup_heads(shard, model.head_size) for shard in shards]
            parameters |= _unfuse(shards, names, f"{source}: {name}")
        elif module == "mlp.dense_h_to_4h":
            names = [f"mlp.{projection}_proj.{kind}" for projection in (("gate", "up") if model.swiglu else ("up",))]
            parameters |= _unfuse(shards, names, f"{source}: {name}")
        else:
            raise ConfigurationError(f"{source}: has {name}, which a block of this model does not have")
    return parameters


def _non_block(layer: Layer, source: str) -> dict[str, Tensor]:
    """Return the parameters of a layer that is not a block, by our names: embedding, final norm or head."""
    names = {EMBEDDING: "embed_tokens.weight", HEAD: "lm_head.weight", "weight": "norm.weight", "bias": "norm.bias"}
    unknown = next((name for name in layer[0] if name not in names), None)
    if unknown:
        raise ConfigurationError(f"{source}: has {unknown}, which this model does not have")
    parameters = {}
    for name in layer[0]:
        shards = _shards(layer, name, source)
        parameters[names[name]] = torch.cat(shards) if name in (EMBEDDING, HEAD) else shards[0]
    return parameters


def _shards(layer: Layer, name: str, source: str) -> list[Tensor]:
    """Return the shards of one parameter, by tp rank."""
    rank = next((rank for rank, tensors in enumerate(layer) if name not in tensors), None)
    if rank is not None:
        raise ConfigurationError(f"{source}: rank {rank} lacks {name}, which rank 0 has; give files of one checkpoint")
    return [tensors[name] for tensors in layer]


def _unfuse(shards: list[Tensor], names: list[str], source: str) -> dict[str, Tensor]:
    """Return the parameters `names` that every shard holds fused along dim 0, in equal chunks."""
    rows = len(shards[0])
    if rows % len(names):
        raise ConfigurationError(
            f"{source} has {rows} rows, which do not divide into {len(names)} equal chunks; give the flags of its model"
        )
    chunks = zip(*(shard.chunk(len(names)) for shard in shards), strict=True)
    return {name: torch.cat(chunk) for name, chunk in zip(names, chunks, strict=True)}


def _ungroup_heads(shard: Tensor, head_size: int) -> Tensor:
    """Return rows grouped by head, [heads * 3 * head_size, ...], as all queries, then all keys, then all values."""
    if len(shard) % (3 * head_size):
        return shard  # of another size, which check_weights reports
    return shard.unflatten(0, (-1, 3, head_size)).transpose(0, 1).flatten(0, 2)


def _mask_row(weights: dict[str, Tensor], vocabulary: Vocabulary, objective: str, path: Path) -> int | None:
    """Return the embedding row of [MASK] if it is the last of an embedding with one row more than the head, else None.

    That is --untie-with-additional-mask of the published system; otherwise [MASK] is row V.

    Raises: ConfigurationError if the embedding has too few rows.
    """
    masked = capabilities(objective).needs_mask
    num_rows = len(weights["embed_tokens.weight"])
    num_ids = vocabulary.size + int(masked)
    if num_rows < num_ids:
        raise ConfigurationError(
            f"{path}: its embedding has {num_rows} rows, and the {vocabulary.size} ids of the tokenizer"
            f"{' and [MASK]' if masked else ''} need {num_ids}; give its own tokenizer"
        )
    has_extra_row = "lm_head.weight" in weights and num_rows == len(weights["lm_head.weight"]) + 1
    return num_rows - 1 if has_extra_row and masked else None
