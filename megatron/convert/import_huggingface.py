"""Import a transformers folder as a run: an export restores its run; other folders become a run at step 0."""

from pathlib import Path

import torch
from torch import Tensor

from megatron.config.parametrization import standard_settings
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.export import EXTRA_ROWS, RECORD
from megatron.convert.folders import check_new, new_folder
from megatron.convert.huggingface import TABLES
from megatron.convert.import_tokenizer import adopt_tokenizer
from megatron.convert.read_huggingface import Folder, read_folder, read_object, read_tensors
from megatron.convert.tokenizer import copy_tokenizer
from megatron.convert.write_imported_run import describe_import, fill_tables, model_flags, write_run
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse

# model settings in which config.json and the record of an export must agree
MODEL_SETTINGS = ("num_layers", "hidden_size", "num_attention_heads", "head_size", "key_value_heads", "mlp_size")
MODEL_SETTINGS += ("norm_epsilon", "qk_layernorm", "rotary_base", "add_bias_linear")
MODEL_SETTINGS += ("untie_embeddings_and_output_weights",)
# keys of a run's config.json that later tools read, in addition to those read here
REQUIRED_KEYS = ("data", "optimizer", "validation", "precision", "plan", "parameters", "unique_tokens")
REQUIRED_KEYS += ("corpus_source", "corpus_hash", "fingerprints")


def import_folder(path: Path, output: Path, seq_length: int | None = None) -> list[str]:
    """Convert the transformers folder `path` to the run folder `output`; return lines that describe the run.

    `seq_length` is only for folders that are not exports of a run; the default is the model's maximum.

    Raises: ConfigurationError if our model cannot express config.json, or files are missing or damaged.
    """
    check_new(output)
    folder = read_folder(path)
    if (path / RECORD).exists():
        return _restore(folder, output, seq_length)
    return _import_model(folder, output, seq_length)


def _restore(folder: Folder, output: Path, seq_length: int | None) -> list[str]:
    """Restore the run of an export: its configuration, all vocabulary rows, its tokenizer."""
    record = read_object(folder.path / RECORD)
    try:
        recorded, meta = dict(record["config"]), record["meta"]
        vocabulary = Vocabulary(recorded["vocabulary_size"])
        time_block = meta["time_block"]
        recorded["model"] = standard_settings(recorded["model"])  # the export has folded the multipliers in
        model = ModelConfig(**recorded["model"])
        seed = recorded["training"]["seed"]
        masked = capabilities(recorded["objective_name"]).export == "masked"
        for key in REQUIRED_KEYS:
            recorded[key]
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{folder.path}/{RECORD}: is damaged ({error}); remove it to import the weights alone"
        ) from None
    if seq_length is not None:
        raise ConfigurationError(
            f"--seq-length {seq_length}: {folder.path} is the export of a run, which recorded its own; leave it out"
        )
    if model.num_loops > 1:
        raise ConfigurationError(
            f"{folder.path}: is the unrolled export of a run with --num-loops {model.num_loops}, which no folder of "
            f"transformers can hold; use the run folder, or remove {RECORD} to import {model.depth} separate layers"
        )
    for name in MODEL_SETTINGS:
        if getattr(model, name) != getattr(folder.model, name):
            raise ConfigurationError(
                f"{folder.path}: config.json and {RECORD} describe different models ({name} "
                f"{getattr(folder.model, name)} and {getattr(model, name)}); remove {RECORD} to import the weights "
                "alone"
            )
    if masked != folder.family.bidirectional:
        raise ConfigurationError(
            f"{folder.path}: config.json describes a {folder.family.model}, and {RECORD} a run of --objective "
            f"{recorded['objective_name']}; remove {RECORD} to import the weights alone"
        )
    num_rows = vocabulary.size + int(masked)
    if folder.config.vocab_size != num_rows:
        raise ConfigurationError(
            f"{folder.path}/config.json: vocab_size {folder.config.vocab_size} is not the {num_rows} ids of {RECORD}; "
            f"remove {RECORD} to import the weights alone"
        )
    weights, notes = _with_extra_rows(folder, model, vocabulary, seed)
    recorded["imported"] = {
        "source": str(folder.path),
        **{name: record.get(name) for name in ("run", "checkpoint", "average", "dtype")},
        **{name: meta.get(name) for name in ("iteration", "consumed_samples")},
    }
    with new_folder(output) as partial:
        _restore_tokenizer(folder.path, partial, output, recorded)
        write_run(partial, recorded, weights, time_block)
    return [
        f"{output}: the run {record.get('run')} as it was at step {meta.get('iteration')}, with a new optimizer",
        *notes,
    ]


def _with_extra_rows(
    folder: Folder, model: ModelConfig, vocabulary: Vocabulary, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights with the padded vocabulary rows, and a line if those are newly initialised."""
    path = folder.path / EXTRA_ROWS
    weights = dict(folder.weights)
    if not path.exists():
        first, last = folder.config.vocab_size, vocabulary.padded_size - 1
        note = f"{path.name} is missing: vocabulary rows {first} to {last} are newly initialised"
        return fill_tables(weights, model, vocabulary, seed=seed), [note]
    extra = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    for name in [name for name in TABLES if name in weights]:
        shape = (vocabulary.padded_size - folder.config.vocab_size, model.hidden_size)
        if name not in extra or extra[name].shape != shape:
            raise ConfigurationError(
                f"{path}: does not hold the {shape[0]} missing rows of {name}; remove it to initialise them again"
            )
        weights[name] = torch.cat([weights[name], extra[name]])
    return weights, []


def _restore_tokenizer(path: Path, partial: Path, output: Path, recorded: dict) -> None:
    """Copy the tokenizer file into the run, and set the run's tokenizer flags to it."""
    for suffix, kind in (("json", "HFTokenizer"), ("model", recorded["data"]["tokenizer_type"])):
        source = path / f"training_tokenizer.{suffix}"
        if source.exists():
            (partial / f"tokenizer.{suffix}").write_bytes(source.read_bytes())
            final_path = str(output.resolve() / f"tokenizer.{suffix}")
            # GPT-2's two files are merged into one, with the same hash
            changes = {"tokenizer_type": kind, "tokenizer_model": final_path, "vocab_file": None, "merge_file": None}
            recorded["data"] = recorded["data"] | changes


def _import_model(folder: Folder, output: Path, seq_length: int | None) -> list[str]:
    """Write a run of which only the model, its weights and, if we support it, its tokenizer are known."""
    objective = "mdm" if folder.family.bidirectional else "ar"
    num_rows = folder.config.vocab_size
    with new_folder(output) as partial:
        tokenizer, note = adopt_tokenizer(folder, partial)
        if tokenizer is None:
            size = num_rows - 1 if folder.mask_row == num_rows - 1 else num_rows
            flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size - 1)]
            note += (
                f"; its {size} ids are used as they are, the last as the end-of-document token (--tokenizer-type "
                "NullTokenizer)"
            )
            if folder.config.eos_token_id not in (None, size - 1):
                note += f", not eos_token_id {folder.config.eos_token_id}"
        else:
            size = tokenizer.vocabulary_size
            data = copy_tokenizer(tokenizer, partial, output)
            flags = ["--tokenizer-type", data["tokenizer_type"], "--tokenizer-model", data["tokenizer_model"]]
        if size > num_rows:
            raise ConfigurationError(
                f"{folder.path}: its tokenizer has {size} ids and its embedding {num_rows} rows; give the tokenizer of "
                "the model, or none"
            )
        seq_length = folder.config.max_position_embeddings if seq_length is None else seq_length
        flags += ["--seq-length", str(seq_length)]
        config = parse(objective, [*model_flags(folder.model).split(), *flags, "--train-samples", "1", "--fp32"])
        vocabulary = Vocabulary(size)
        row = {"seed": config.training.seed, "mask_row": folder.mask_row}
        weights = fill_tables(folder.weights, folder.model, vocabulary, **row)
        recorded = describe_import(config, vocabulary, str(folder.path))
        write_run(partial, recorded, weights, config.training.global_batch_size)
    return [
        f"{output}: a run of --objective {objective} over {size:,} ids, at step 0; its training history is unknown",
        note,
        *_row_notes(folder, vocabulary),
        f"to continue training, branch from it with its model flags: --load {output} {model_flags(folder.model)}",
    ]


def _row_notes(folder: Folder, vocabulary: Vocabulary) -> list[str]:
    """Return lines that list the vocabulary rows that moved, were dropped or are newly initialised."""
    num_rows = folder.config.vocab_size
    notes = []
    if folder.mask_row is not None and folder.mask_row != vocabulary.mask_id:
        notes.append(f"[MASK] is id {vocabulary.mask_id} here: its row is that of their mask token, {folder.mask_row}")
    if num_rows > vocabulary.padded_size:
        notes.append(f"vocabulary rows {vocabulary.padded_size} to {num_rows - 1}, which no id uses, are left out")
    if num_rows < vocabulary.padded_size:
        first = max(num_rows, vocabulary.mask_id + 1) if folder.mask_row is not None else num_rows
        notes.append(f"vocabulary rows {first} to {vocabulary.padded_size - 1} are newly initialised")
    return notes
