"""A folder of transformers as a run: an export comes back as what it was, others as far as they are known."""

from pathlib import Path

import torch
from torch import Tensor

from megatron.config.sections import ModelConfig, Vocabulary
from megatron.convert.export import EXTRA_ROWS, RECORD
from megatron.convert.folders import check_new, new_folder
from megatron.convert.huggingface import TABLES
from megatron.convert.import_tokenizer import adopt_tokenizer
from megatron.convert.read_huggingface import Folder, read_folder, read_object, read_tensors
from megatron.convert.tokenizer import keep_tokenizer
from megatron.convert.write_imported_run import describe_import, fill_tables, network_flags, write_run
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse

# what two configurations of one network agree in
NETWORK = ("num_layers", "hidden_size", "num_attention_heads", "head_size", "key_value_heads", "mlp_size")
NETWORK += ("norm_epsilon", "qk_layernorm", "rotary_base", "add_bias_linear", "untie_embeddings_and_output_weights")
# what later tools read of a run's config.json, beside what is read here
NEEDED = ("data", "optimizer", "validation", "precision", "plan", "parameters", "unique_tokens", "corpus_source")
NEEDED += ("corpus_hash", "fingerprints")


def import_folder(path: Path, output: Path, seq_length: int | None = None) -> list[str]:
    """Write the run folder `output` of the transformers folder `path`; return lines that say what was made.

    `seq_length` is the run's where the folder is no export of a run; the default is all positions of the model. Raises
    ConfigurationError where our network cannot be what config.json says, or files are missing or damaged.
    """
    check_new(output)
    folder = read_folder(path)
    if (path / RECORD).exists():
        return _restore(folder, output, seq_length)
    return _adopt(folder, output, seq_length)


def _restore(folder: Folder, output: Path, seq_length: int | None) -> list[str]:
    """Write the run that an export was made of: its whole configuration, all rows, its tokenizer."""
    record = read_object(folder.path / RECORD)
    try:
        recorded, meta = dict(record["config"]), record["meta"]
        vocabulary, time_block = Vocabulary(recorded["vocabulary_size"]), meta["time_block"]
        model, seed = ModelConfig(**recorded["model"]), recorded["training"]["seed"]
        masked, _ = recorded["objective_name"] == "mdm", [recorded[name] for name in NEEDED]
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{folder.path}/{RECORD}: is damaged ({error}); remove it to import the weights alone"
        ) from None
    if seq_length is not None:
        raise ConfigurationError(
            f"--seq-length {seq_length}: {folder.path} is the export of a run, which recorded its own; leave it out"
        )
    for name in NETWORK:
        if getattr(model, name) != getattr(folder.model, name):
            raise ConfigurationError(
                f"{folder.path}: config.json and {RECORD} are of different networks ({name} "
                f"{getattr(folder.model, name)} and {getattr(model, name)}); remove the latter to import weights alone"
            )
    if masked != folder.family.bidirectional:
        raise ConfigurationError(
            f"{folder.path}: config.json is of a {folder.family.model}, and {RECORD} of --objective "
            f"{recorded['objective_name']}; remove the latter to import the weights alone"
        )
    rows = vocabulary.size + masked
    if folder.config.vocab_size != rows:
        raise ConfigurationError(
            f"{folder.path}/config.json: vocab_size {folder.config.vocab_size} is not the {rows} ids of {RECORD}; "
            "remove the latter to import the weights alone"
        )
    weights, said = _with_extra_rows(folder, model, vocabulary, seed)
    recorded["imported"] = {
        "source": str(folder.path),
        **{name: record.get(name) for name in ("run", "checkpoint", "average", "dtype")},
        **{name: meta.get(name) for name in ("iteration", "consumed_samples")},
    }
    with new_folder(output) as aside:
        _restore_tokenizer(folder.path, aside, output, recorded)
        write_run(aside, recorded, weights, time_block)
    return [
        f"{output}: the run {record.get('run')} as it was at step {meta.get('iteration')}, with a new optimizer",
        *said,
    ]


def _with_extra_rows(
    folder: Folder, model: ModelConfig, vocabulary: Vocabulary, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights with whole tables, and a line where rows are new ones."""
    path, weights = folder.path / EXTRA_ROWS, dict(folder.weights)
    if not path.exists():
        line = f"{path.name} is missing: rows {folder.config.vocab_size} to {vocabulary.padded_size - 1} are new ones"
        return fill_tables(weights, model, vocabulary, seed), [line]
    extra = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    for name in [name for name in TABLES if name in weights]:
        needed = (vocabulary.padded_size - folder.config.vocab_size, model.hidden_size)
        if name not in extra or extra[name].shape != needed:
            raise ConfigurationError(
                f"{path}: does not hold the {needed[0]} rows of {name} that are missing; remove it to begin them anew"
            )
        weights[name] = torch.cat([weights[name], extra[name]])
    return weights, []


def _restore_tokenizer(path: Path, aside: Path, output: Path, recorded: dict) -> None:
    """Copy the tokenizer's file into the run, and let its configuration name it."""
    for suffix, kind in (("json", "HFTokenizer"), ("model", recorded["data"]["tokenizer_type"])):
        source = path / f"training_tokenizer.{suffix}"
        if source.exists():
            (aside / f"tokenizer.{suffix}").write_bytes(source.read_bytes())
            named = str(output.resolve() / f"tokenizer.{suffix}")
            # GPT-2's two files are one here, of the same hash
            changes = {"tokenizer_type": kind, "tokenizer_model": named, "vocab_file": None, "merge_file": None}
            recorded["data"] = recorded["data"] | changes


def _adopt(folder: Folder, output: Path, seq_length: int | None) -> list[str]:
    """Write a run of which only network, weights and, where it is of our kind, tokenizer are known."""
    objective, rows = "mdm" if folder.family.bidirectional else "ar", folder.config.vocab_size
    with new_folder(output) as aside:
        tokenizer, line = adopt_tokenizer(folder, aside)
        if tokenizer is None:
            size = rows - (folder.mask_row == rows - 1)
            flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size - 1)]
            line += (
                f"; its {size} ids are taken as they are, the last as the end of a document (--tokenizer-type "
                "NullTokenizer)"
            )
            if folder.config.eos_token_id not in (None, size - 1):
                line += f", not eos_token_id {folder.config.eos_token_id}"
        else:
            size, data = tokenizer.vocabulary_size, keep_tokenizer(tokenizer, aside, output)
            flags = ["--tokenizer-type", data["tokenizer_type"], "--tokenizer-model", data["tokenizer_model"]]
        if size > rows:
            raise ConfigurationError(
                f"{folder.path}: its tokenizer has {size} ids and its embedding {rows} rows; give the tokenizer of the "
                "model, or none"
            )
        flags += ["--seq-length", str(seq_length or folder.config.max_position_embeddings)]
        config = parse(objective, [*network_flags(folder.model).split(), *flags, "--train-samples", "1", "--fp32"])
        vocabulary = Vocabulary(size)
        weights = fill_tables(folder.weights, folder.model, vocabulary, config.training.seed, folder.mask_row)
        recorded = describe_import(config, vocabulary, str(folder.path))
        write_run(aside, recorded, weights, config.training.global_batch_size)
    return [
        f"{output}: a run of --objective {objective} over {size:,} ids, at step 0; nothing is known of its training",
        line,
        *_rows_said(folder, vocabulary),
        f"train it on as a branch, with the flags of its network: --load {output} {network_flags(folder.model)}",
    ]


def _rows_said(folder: Folder, vocabulary: Vocabulary) -> list[str]:
    """Return lines that say which rows of the padded vocabulary are not the folder's at the same place."""
    rows, mask, said = folder.config.vocab_size, vocabulary.mask_id, []
    if folder.mask_row is not None and folder.mask_row != mask:
        said.append(f"[MASK] is id {mask} here: its row is that of their mask token, {folder.mask_row}")
    if rows > vocabulary.padded_size:
        said.append(f"rows {vocabulary.padded_size} to {rows - 1}, which no id reads, are left out")
    if rows < vocabulary.padded_size:
        first = max(rows, mask + 1) if folder.mask_row is not None else rows
        said.append(f"rows {first} to {vocabulary.padded_size - 1} are new ones")
    return said
