"""Checkpoints of Megatron-DeepSpeed's pipeline as a run: layer_XX-model_YY-model_states.pt, a layer XX, a tp rank YY.

layer 01          word_embeddings.weight: the rows of the padded vocabulary, shared out over the ranks
layers 02 .. L+1  the blocks
behind them       the final norm, then the head where it has a matrix of its own; told by the names in the files

As deepspeedai/Megatron-DeepSpeed writes them at 4efb479 (megatron/model/{gpt_model,transformer}.py), its newest commit,
on which the published system of 2507.15857 is built. In one rank's rows of query_key_value all queries come first, then
all keys, then all values; dense_h_to_4h holds, with SwiGLU, the gate and then the other half. Nothing in the files
tells the sizes: flags do. The files are pickles, of which tensors alone are read.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from megatron.config.flags import require
from megatron.config.sections import ModelConfig, Vocabulary
from megatron.convert.folders import check_new, new_folder
from megatron.convert.tokenizer import keep_tokenizer
from megatron.convert.write_imported_run import check_weights, describe_import, fill_tables, network_flags, write_run
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse

FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
COPIED = ("input_layernorm", "post_attention_layernorm")  # every rank has them whole
SPLIT = {"self_attention.dense": "self_attn.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}  # by their input
EMBEDDING, HEAD, QUERIES = "word_embeddings.weight", "lm_head.weight", "self_attention.query_key_value.weight"

Layer = list[dict[str, Tensor]]  # what one layer has, by rank of tensor parallelism


def import_checkpoint(path: Path, output: Path, flags: list[str], by_head: bool = False) -> list[str]:
    """Write the run folder `output` of the checkpoint `path`, a folder of layer files or one whose `latest` names it.

    `flags` are those of pretrain_gpt.py: the network, --objective, the tokenizer; `by_head` is as in
    `read_checkpoint`. Returns lines that say what was made.
    Raises ConfigurationError where they and the files do not fit, or files are missing or hold more than tensors.
    """
    check_new(output)
    config = parse("ar", [*flags, "--train-samples", "1"])
    model, data, objective = config.model, config.data, config.objective.objective
    rule = "is none that Megatron-DeepSpeed trains; give ar or mdm"
    require(objective in ("ar", "mdm"), "objective", objective, rule)
    rule = "has no place in these files, which hold as many keys as queries; leave it out"
    require(not model.group_query_attention, "group_query_attention", True, rule)
    require(not model.qk_layernorm, "qk_layernorm", True, "has no place in these files; leave it out")
    file, vocabulary_file, merges = data.tokenizer_model, data.vocab_file, data.merge_file
    tokenizer = build_tokenizer(data.tokenizer_type, file, data.vocab_size, vocabulary_file, merges)
    vocabulary = Vocabulary(tokenizer.vocabulary_size)
    weights = read_checkpoint(path, model, vocabulary, by_head)
    mask_row = _mask_row(weights, vocabulary, objective, path)
    weights = fill_tables(weights, model, vocabulary, config.training.seed, mask_row)
    recorded = describe_import(config, vocabulary, str(path), "bf16" if config.training.bf16 else "fp32")
    with new_folder(output) as aside:
        recorded["data"] |= keep_tokenizer(tokenizer, aside, output)
        write_run(aside, recorded, weights, config.training.global_batch_size)
    return [
        f"{output}: a run of --objective {objective} over {vocabulary.size:,} ids, at step 0",
        f"train it on as a branch, with the flags of its network: --load {output} {network_flags(model)}",
    ]


def read_checkpoint(path: Path, model: ModelConfig, vocabulary: Vocabulary, by_head: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in fp32 by our names; embedding and head with the rows they have there.

    With `by_head`, rows of query_key_value stand head by head, query, key and value of each together: so wrote
    Megatron-DeepSpeed before 676a482 (December 2024), and no shape tells the two apart.
    """
    folder = _folder(path)
    layers = {number: [_load(file) for file in files] for number, files in _files(folder).items()}
    blocks = [number for number, layer in layers.items() if QUERIES in layer[0]]
    if len(blocks) != model.num_layers or blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        raise ConfigurationError(
            f"{folder}: holds {len(blocks)} blocks, in layers {', '.join(map(str, blocks)) or 'of other names'}, and "
            f"the network has {model.num_layers}; give its --num-layers, or the missing files"
        )
    weights = {}
    for number, layer in layers.items():
        where = f"{folder}/layer_{number:02d}"
        if number in blocks:
            found = _block(layer, model, where, by_head)
            weights |= {f"layers.{number - blocks[0]}.{name}": tensor for name, tensor in found.items()}
        else:
            weights |= _outside(layer, where)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    check_weights(weights, model, vocabulary, str(folder))
    return weights


def _folder(path: Path) -> Path:
    """Return the folder of the layer files: `path`, or the one inside that its file `latest` names."""
    if path.is_dir() and any(FILE.fullmatch(each.name) for each in path.iterdir()):
        return path
    latest = path / "latest"
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    if name and Path(name).name == name and (path / name).is_dir():
        return path / name
    raise ConfigurationError(
        f"{path}: holds no layer_XX-model_YY-model_states.pt, and no file latest that names such a folder; give a "
        "global_stepN folder of Megatron-DeepSpeed's pipeline"
    )


def _files(folder: Path) -> dict[int, list[Path]]:
    """Return the files of each layer by rank; raise ConfigurationError where a rank lacks one."""
    found = {}
    for file in folder.iterdir():
        match = FILE.fullmatch(file.name)
        if match:
            found[int(match[1]), int(match[2])] = file
    ranks, numbers = (sorted(set(each)) for each in (zip(*((rank, number) for number, rank in found), strict=True)))
    for number in numbers:
        for rank in range(ranks[-1] + 1):
            if (number, rank) not in found:
                name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                raise ConfigurationError(f"{folder}: has no {name}; give a whole checkpoint")
    return {number: [found[number, rank] for rank in range(ranks[-1] + 1)] for number in numbers}


def _load(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; nothing that it holds is executed."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint can fail in any way
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigurationError(
            f"{file}: cannot be read as tensors alone ({reason}); copy it anew, and trust no file that holds more"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ConfigurationError(f"{file}: does not hold the tensors of a layer; give a checkpoint of a pipeline")
    return {name: tensor for name, tensor in found.items() if not name.endswith("inv_freq")}


def _block(layer: Layer, model: ModelConfig, where: str, by_head: bool) -> dict[str, Tensor]:
    """Return the parameters of a block by our names in it."""
    found = {}
    for name in layer[0]:
        part, _, kind = name.rpartition(".")
        shares = _shares(layer, name, where)
        if part in COPIED:
            found[name] = shares[0]
        elif part in SPLIT:
            found[f"{SPLIT[part]}.{kind}"] = torch.cat(shares, dim=1) if kind == "weight" else shares[0]
        elif part == "self_attention.query_key_value":
            names = [f"self_attn.{each}_proj.{kind}" for each in "qkv"]
            shares = [_by_part(share, model.head_size) for share in shares] if by_head else shares
            found |= _stacked(shares, names, f"{where}: {name}")
        elif part == "mlp.dense_h_to_4h":
            names = [f"mlp.{each}_proj.{kind}" for each in (("gate", "up") if model.swiglu else ("up",))]
            found |= _stacked(shares, names, f"{where}: {name}")
        else:
            raise ConfigurationError(f"{where}: has {name}, and a block of this network has no such part")
    return found


def _outside(layer: Layer, where: str) -> dict[str, Tensor]:
    """Return what a layer that is no block holds, by our names: embedding, final norm or head."""
    names = {EMBEDDING: "embed_tokens.weight", HEAD: "lm_head.weight", "weight": "norm.weight", "bias": "norm.bias"}
    unknown = next((name for name in layer[0] if name not in names), None)
    if unknown:
        raise ConfigurationError(f"{where}: has {unknown}, and this network has no such part")
    shares = {name: _shares(layer, name, where) for name in layer[0]}
    return {names[name]: torch.cat(each) if name in (EMBEDDING, HEAD) else each[0] for name, each in shares.items()}


def _shares(layer: Layer, name: str, where: str) -> list[Tensor]:
    """Return what each rank has of one parameter."""
    rank = next((rank for rank, shares in enumerate(layer) if name not in shares), None)
    if rank is not None:
        raise ConfigurationError(f"{where}: rank {rank} lacks {name}, which rank 0 has; give files of one checkpoint")
    return [shares[name] for shares in layer]


def _stacked(shares: list[Tensor], names: list[str], what: str) -> dict[str, Tensor]:
    """Return the parameters `names` whose rows stand one below the other in the share of every rank."""
    rows = len(shares[0])
    if rows % len(names):
        raise ConfigurationError(f"{what} has {rows} rows, which are not {len(names)} equal parts; give its own flags")
    parts = zip(*(share.chunk(len(names)) for share in shares), strict=True)
    return {name: torch.cat(part) for name, part in zip(names, parts, strict=True)}


def _by_part(share: Tensor, head_size: int) -> Tensor:
    """Return rows that stand head by head, [heads * 3 * head_size, ...], with all queries first, keys, values."""
    if len(share) % (3 * head_size):
        return share  # of other sizes, as is told of it
    return share.unflatten(0, (-1, 3, head_size)).transpose(0, 1).flatten(0, 2)


def _mask_row(weights: dict[str, Tensor], vocabulary: Vocabulary, objective: str, path: Path) -> int | None:
    """Return which row of the embedding is [MASK]'s where that is not V: one more than the head has rows.

    (--untie-with-additional-mask of the published system.) Raises ConfigurationError where rows are missing.
    """
    rows, needed = len(weights["embed_tokens.weight"]), vocabulary.size + (objective == "mdm")
    if rows < needed:
        raise ConfigurationError(
            f"{path}: its embedding has {rows} rows, and the {vocabulary.size} ids of the tokenizer"
            f"{' and [MASK]' if objective == 'mdm' else ''} need {needed}; give its own tokenizer"
        )
    one_more = "lm_head.weight" in weights and rows == len(weights["lm_head.weight"]) + 1
    return rows - 1 if one_more and objective == "mdm" else None
