"""Loads a finished or running training run at one of its checkpoints, saved under any layout, for other tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.flags import spelling
from megatron.config.sections import Config, ModelConfig
from megatron.config.tokenizer_flags import SENTENCE_PIECE
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import read_metadata
from megatron.data.paths import requested_sets
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.model.attention import disable_cudnn_attention
from megatron.model.transformer import Transformer
from megatron.objectives.registry import DOCUMENT_RULES
from megatron.training.checkpoint_store import find_checkpoint, load_checkpoint, read_meta
from megatron.training.command_line import evaluation_config
from megatron.training.datasets import tokenizer_of_data
from megatron.training.run_folder import recorded_config


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training run at one of its checkpoints."""

    name: str  # as the user names it
    config: Config  # the recorded one, as --skip-train reads it
    recorded: dict  # config.json of the run
    checkpoint: Path
    meta: dict  # meta.json of the checkpoint

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the run's tokenizer."""
        return Vocabulary(self.recorded["vocabulary_size"])

    @property
    def computed_parameters(self) -> int:
        """N with a block counted once for each of its uses; older runs have no loops and do not record it."""
        return self.recorded["plan"].get("computed_parameters", self.recorded["parameters"])

    def model(self, average: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
        """Return the whole model on one device, in evaluation mode, with its weights or their average.

        Scoring and generation give attention many shapes, so this process does not use cuDNN's kernel from then on.

        Raises: ConfigurationError if the checkpoint has no averaged weights.
        """
        if average and not self.meta.get("averaged_steps"):
            raise ConfigurationError(
                f"{self.name}: holds no average of its weights at step {self.meta['iteration']}; train with "
                "--ema-decay or --average-from-samples, or use the model weights"
            )
        disable_cudnn_attention()
        with torch.device(device):
            model = Transformer(self.config.model, self.vocabulary)
        prefix = "average" if average else "model"
        weights = {f"{prefix}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        load_checkpoint(self.checkpoint, weights)
        return model.to(dtype).eval()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run: the one its flags name, else the file next to its training data.

        Raises: ConfigurationError if the file is missing or is another tokenizer.
        """
        data, prefix, metadata = self.config.data, "", {}
        # the training data may have been deleted, and some tokenizers need no file
        if data.tokenizer_model is None and data.tokenizer_type in ("HFTokenizer", *SENTENCE_PIECE):
            prefix = requested_sets(data, with_test=False)[0].prefixes[0]
            metadata = read_metadata(prefix)
            if not metadata.get("tokenizer_model"):
                raise ConfigurationError(
                    f"{prefix}.json: is missing or names no tokenizer, and the tokenizer of {self.name} is next to its "
                    "training data; restore their folder, or give --tokenizer-model if the command has it"
                )
        tokenizer = tokenizer_of_data(data, prefix, metadata)
        expected = self.recorded.get("tokenizer_hash") or metadata.get("tokenizer_hash", tokenizer.hash)
        if (tokenizer.vocabulary_size, tokenizer.hash) != (self.vocabulary.size, expected):
            raise ConfigurationError(
                f"{tokenizer.flag}: is not the tokenizer of {self.name}, which has {self.vocabulary.size} ids; give "
                "the tokenizer of its training data"
            )
        return tokenizer


def open_trained(run: str, which: str = "latest", flags: Sequence[str] = ()) -> Trained:
    """Return a run at its `which` ("latest" or "best") checkpoint; `run` may also be a checkpoint folder.

    `flags` are those of pretrain_gpt.py and override the recorded settings.

    Raises: ConfigurationError if there is no run or no such checkpoint, or if it is damaged.
    """
    recorded = _recorded(run)
    config, folder = evaluation_config(recorded, run, flags), find_checkpoint(Path(run), which)
    return Trained(name=run, config=config, recorded=recorded, checkpoint=folder, meta=read_meta(folder))


def shared_settings(config: Config, vocabulary_size: int) -> dict:
    """Return the settings that models must share whose probabilities are averaged or compared token by token."""
    return {
        "objective": config.objective.objective,
        **{spelling(name): getattr(config.objective, name) for name in ("target_positions", "diffusion_block_size")},
        **{spelling(name): getattr(config.data, name) for name in DOCUMENT_RULES},
        "vocabulary size": vocabulary_size,
        "--tokenizer-type": config.data.tokenizer_type,
    }


def trained_config(run: str, flags: Sequence[str] = ()) -> Config:
    """Return the recorded configuration of a run or of a checkpoint's run, as --skip-train with `flags` reads it.

    Raises: ConfigurationError if there is no run.
    """
    return evaluation_config(_recorded(run), run, flags)


def teacher_models(config: Config) -> tuple[ModelConfig, ...]:
    """Return the models of the runs that --teacher names, for estimates.

    Raises: ConfigurationError if one is no run.
    """
    return tuple(trained_config(name).model for name in config.distillation.teacher)


def _recorded(run: str) -> dict:
    recorded = recorded_config(Path(run))
    if recorded is None:
        raise ConfigurationError(f"{run}: holds no run and is no checkpoint; give a folder that --save wrote")
    return recorded
