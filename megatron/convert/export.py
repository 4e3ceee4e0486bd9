"""A trained run as a folder that transformers loads without our code, and that comes back as the same run.

config.json, model*.safetensors           the model over the tokenizer's V ids, masked diffusion over [MASK] = V too
generation_config.json                    of a causal one
tokenizer.json, tokenizer_config.json     the tokenizer
README.md                                 the model card
extra_rows.safetensors                    the other rows of the padded vocabulary
training_run.json, training_tokenizer.*   what the run recorded, and the file of its tokenizer, for the way back
"""

import logging
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron.config.flags import typed
from megatron.convert.card import model_card, validation_records
from megatron.convert.folders import check_new, new_folder, set_fields
from megatron.convert.huggingface import extra_rows, family_of, hugging_face_config, hugging_face_model
from megatron.convert.tokenizer import write_tokenizer
from megatron.errors import ConfigurationError
from megatron.training.load_run import Trained
from megatron.training.run_folder import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXTRA_ROWS, RECORD = "extra_rows.safetensors", "training_run.json"


def is_masked(trained: Trained) -> bool:
    """Return whether a run becomes a masked language model; False is a causal one.

    Raises ConfigurationError where stock classes would read it otherwise than it was trained to.
    """
    objective = trained.config.objective
    faults = {
        "objective": {
            "any-order": "predicts in random orders and is told the places of what it must say, which no stock class "
            "of transformers can tell a network",
            "block-diffusion": "reads each text and its masked form at once under a mask of its own, which no stock "
            "class of transformers has",
        }.get(objective.objective),
        "target_positions": objective.target_positions
        and "tells the network the place of the token it must say, which no stock class of transformers can",
        "target_offset_max": objective.target_offset_max > 1
        and "trained the network to say tokens further ahead, by a place that no stock class of transformers tells it",
        "right_to_left_ratio": objective.right_to_left_ratio == 1
        and "trained the network to read from right to left only, and stock classes read from left to right",
    }
    for name, reason in faults.items():
        if reason:
            raise ConfigurationError(
                f"{trained.name}: cannot be exported: {typed(name, getattr(objective, name))} {reason}; use the run "
                "folder, with the tools here"
            )
    return objective.objective == "mdm"


def export(
    trained: Trained, output: Path, *, average: bool = False, dtype: str = "float32", shard: str = "5GB"
) -> list[str]:
    """Write the folder `output` and return lines that say what it holds.

    `dtype` ("float32" or "bfloat16") is that of the weights, `shard` the size of one file of them. Raises
    ConfigurationError where the run cannot be told to transformers exactly or `output` exists, OSError where the disk
    is full; then nothing is left.
    """
    check_new(output)
    if not re.fullmatch(r"[1-9]\d*[KMG]B", shard):
        raise ConfigurationError(f"--max-shard-size {shard}: is no size; give a whole number of KB, MB or GB, as 5GB")
    masked = is_masked(trained)
    family = family_of(trained.config.model, masked)
    family.model_class()  # before the work
    tokenizer, positions = trained.tokenizer(), trained.config.data.seq_length
    rows = trained.vocabulary.size + masked
    config = hugging_face_config(
        trained.config.model,
        rows=rows,
        positions=positions,
        bidirectional=masked,
        eos_token_id=tokenizer.eod,
        pad_token_id=tokenizer.eod,  # what pads a batch is never looked at
        **({"mask_token_id": trained.vocabulary.mask_id} if masked else {}),
    )
    model = trained.model(average, DTYPES[dtype])
    with new_folder(output) as folder, _quiet():
        twin = hugging_face_model(model, config)
        twin.save_pretrained(folder, max_shard_size=shard)
        set_fields(folder / "config.json", torch_dtype=dtype)  # the name of dtype before transformers 4.56
        save_file(extra_rows(model, rows), folder / EXTRA_ROWS)
        written = write_tokenizer(folder, tokenizer, masked=masked, positions=positions)
        write_json(folder / RECORD, record(trained, average, dtype))
        card = model_card(trained, written, output.name, family.model, average, dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
    kind = "masked language model" if masked else "causal language model"
    return [
        f"{output}: {family.model}, a {kind} over {rows:,} ids in {dtype}, of {trained.checkpoint}"
        f"{', averaged weights' if average else ''}",
        f"load it with AutoModelFor{'MaskedLM' if masked else 'CausalLM'}.from_pretrained({str(output)!r})",
    ]


def record(trained: Trained, average: bool, dtype: str) -> dict:
    """Return what training_run.json says: the run's configuration, where the checkpoint stood, and its losses."""
    meta = {name: value for name, value in trained.meta.items() if name not in ("files", "config")}
    return {
        "format": 1,
        "run": Path(trained.name).name,
        "checkpoint": trained.checkpoint.name,
        "average": average,
        "dtype": dtype,
        "meta": meta,
        "validation": validation_records(trained),
        "config": trained.recorded,
    }


@contextmanager
def _quiet():
    """Keep transformers from telling each file it writes; what fails is raised all the same."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
