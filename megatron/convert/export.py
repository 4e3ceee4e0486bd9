"""Export a trained run to a folder that stock transformers loads and that imports back as the same run.

config.json, model*.safetensors           the model over the tokenizer's V ids; masked diffusion adds [MASK] = V
generation_config.json                    causal models only
tokenizer.json, tokenizer_config.json     the tokenizer
README.md                                 the model card
extra_rows.safetensors                    the remaining rows of the padded vocabulary
training_run.json, training_tokenizer.*   the run's configuration and losses, and its tokenizer file, for import
"""

import logging
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron.config.capabilities import Refused
from megatron.config.flags import typed
from megatron.convert.card import model_card, unrolling, validation_records
from megatron.convert.folders import check_new, new_folder, set_fields
from megatron.convert.huggingface import extra_rows, family_of, hugging_face_config, hugging_face_model
from megatron.convert.tokenizer import write_tokenizer
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.load_run import Trained
from megatron.training.run_folder import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXTRA_ROWS, RECORD = "extra_rows.safetensors", "training_run.json"


def is_masked(trained: Trained) -> bool:
    """Return whether a run is exported as a masked language model (True) or a causal one (False).

    Raises: ConfigurationError if stock classes would not compute what the run was trained to compute.
    """
    objective = trained.config.objective
    form = capabilities(objective.objective).export
    obstacles = {
        "objective": isinstance(form, Refused) and form.reason,
        "target_positions": objective.target_positions
        and "gives the model target positions as an input, which no stock class of transformers accepts",
        "target_offset_max": objective.target_offset_max > 1
        and "trained the model to predict tokens further ahead, at target positions that no stock class of "
        "transformers accepts",
        "right_to_left_ratio": objective.right_to_left_ratio == 1
        and "trained the model from right to left only, and stock classes read from left to right",
    }
    for name, obstacle in obstacles.items():
        if obstacle:
            raise ConfigurationError(
                f"{trained.name}: cannot be exported: {typed(name, getattr(objective, name))} {obstacle}; use the run "
                "folder with this project's tools"
            )
    return form == "masked"


def export(
    trained: Trained, output: Path, *, average: bool = False, dtype: str = "float32", max_shard_size: str = "5GB"
) -> list[str]:
    """Write the export `output` and return lines that describe it.

    `dtype` ("float32" or "bfloat16") is that of the weights, `max_shard_size` the size of one file of weights. After
    an error nothing is left on disk.

    Raises: ConfigurationError if transformers cannot express the run exactly or `output` exists; OSError if the disk
    is full.
    """
    check_new(output)
    if not re.fullmatch(r"[1-9]\d*[KMG]B", max_shard_size):
        raise ConfigurationError(
            f"--max-shard-size {max_shard_size}: is not a size; give a whole number of KB, MB or GB, such as 5GB"
        )
    masked = is_masked(trained)
    family = family_of(trained.config.model, masked)
    family.model_class()  # fails early if transformers is missing
    tokenizer = trained.tokenizer()
    max_positions = trained.config.data.seq_length
    num_rows = trained.vocabulary.size + int(masked)
    config = hugging_face_config(
        trained.config.model,
        vocabulary_rows=num_rows,
        max_positions=max_positions,
        bidirectional=masked,
        eos_token_id=tokenizer.eod,
        **({"mask_token_id": trained.vocabulary.mask_id} if masked else {}),
    )
    model = trained.model(average, DTYPES[dtype])
    with new_folder(output) as folder, _quiet():
        exported = hugging_face_model(model, config)
        if exported.can_generate():
            # not in config.json, since the embedding of its padding token gets no gradient
            exported.generation_config.pad_token_id = tokenizer.eod
        exported.save_pretrained(folder, max_shard_size=max_shard_size)
        set_fields(folder / "config.json", torch_dtype=dtype)  # the name of dtype before transformers 4.56
        save_file(extra_rows(model, num_rows), folder / EXTRA_ROWS)
        exported_tokenizer = write_tokenizer(folder, tokenizer, masked=masked, positions=max_positions)
        write_json(folder / RECORD, record(trained, average, dtype))
        card = model_card(
            trained, exported_tokenizer, name=output.name, kind=family.model, average=average, dtype=dtype
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    kind = "masked language model" if masked else "causal language model"
    return [
        f"{output}: {family.model}, a {kind} over {num_rows:,} ids in {dtype}, of {trained.checkpoint}"
        f"{', averaged weights' if average else ''}",
        *([unrolling(trained.config.model)] if trained.config.model.num_loops > 1 else []),
        f"load it with AutoModelFor{'MaskedLM' if masked else 'CausalLM'}.from_pretrained({str(output)!r})",
    ]


def record(trained: Trained, average: bool, dtype: str) -> dict:
    """Return the contents of training_run.json: the run's configuration, the checkpoint's step and its losses."""
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
    """Silence the log and progress bars of transformers; errors are still raised."""
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
