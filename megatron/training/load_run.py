"""Trained runs: what a later tool reads of one, at one of its checkpoints, whatever layout wrote it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.sections import SENTENCE_PIECE, Config, Vocabulary
from megatron.data.indexed import read_metadata
from megatron.data.paths import requested_sets
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer
from megatron.training import checkpoint
from megatron.training.command_line import parse
from megatron.training.datasets import tokenizer_beside
from megatron.training.resume import recorded_config
from megatron.training.run_folder import read_json


@dataclass(frozen=True)
class Trained:
    """One trained run, at one of its checkpoints."""

    name: str  # as the user names it
    config: Config  # as --skip-train takes it over
    recorded: dict  # config.json of the run
    checkpoint: Path
    meta: dict  # of the checkpoint

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.recorded["vocabulary_size"])

    def model(self, average: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
        """Return the whole model on one device, in evaluation mode: its weights, or their average.

        Raises ConfigurationError where the run kept no average.
        """
        if average and not self.meta.get("averaged_steps"):
            raise ConfigurationError(
                f"{self.name}: holds no average of its weights at step {self.meta['iteration']}; train with "
                "--ema-decay or --average-from-samples, or take the weights themselves"
            )
        with torch.device(device):
            model = Transformer(self.config.model, self.vocabulary)
        prefix = "average" if average else "model"
        weights = {f"{prefix}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        checkpoint.load(self.checkpoint, weights)
        return model.to(dtype).eval()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of its training data, which lies beside them unless a flag of the run names it.

        Raises ConfigurationError where it is gone, or is another one.
        """
        data, prefix, made = self.config.data, "", {}
        # the data themselves may be gone, and some tokenizers need nothing that lies beside them
        if data.tokenizer_model is None and data.tokenizer_type in ("HFTokenizer", *SENTENCE_PIECE):
            prefix = requested_sets(data, with_test=False)[0].prefixes[0]
            made = read_metadata(prefix)
            if not made.get("tokenizer_model"):
                raise ConfigurationError(
                    f"{prefix}.json: is gone, or names no tokenizer, and that of {self.name} lies beside its training "
                    "data; put their folder back, or give --tokenizer-model where a command takes it"
                )
        tokenizer = tokenizer_beside(data, prefix, made)
        expected = made.get("tokenizer_hash", tokenizer.hash)
        if (tokenizer.vocabulary_size, tokenizer.hash) != (self.vocabulary.size, expected):
            raise ConfigurationError(
                f"{tokenizer.named}: is not the tokenizer of {self.name}, which knows {self.vocabulary.size} ids; give "
                "the one that made its training data"
            )
        return tokenizer


def open_trained(run: str, which: str = "latest", flags: Sequence[str] = ()) -> Trained:
    """Return a run at its `which` ("latest" or "best") checkpoint, or at the checkpoint that `run` is.

    `flags` are of pretrain_gpt.py and win over what the run recorded. Raises ConfigurationError where there is no run,
    no such checkpoint, or a damaged one.
    """
    config, folder = trained_config(run, flags), find_checkpoint(Path(run), which)
    return Trained(run, config, recorded_config(Path(run)), folder, read_json(folder / "meta.json"))


def trained_config(run: str, flags: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, or of the run of a checkpoint, as --skip-train beside `flags` takes it over.

    Raises ConfigurationError where there is no run.
    """
    if recorded_config(Path(run)) is None:
        raise ConfigurationError(f"{run}: holds no run and is no checkpoint; give a folder that --save wrote")
    return parse("ar", ["--skip-train", "--load", run, *flags])  # the run says which objective is its own


def find_checkpoint(run: Path, which: str) -> Path:
    """Return the folder of the checkpoint that `run` is, or of its own the "latest" or "best" one."""
    if (run / "meta.json").exists():
        folder = run
    elif which == "latest":
        found = checkpoint.newest(run / "checkpoints", mend=False)
        if found is None:
            raise ConfigurationError(f"{run}: holds no checkpoint; train it first")
        return found[0]
    else:
        pointer = run / "checkpoints" / "best.json"
        if not pointer.exists():
            raise ConfigurationError(
                f"--checkpoint best: {run} has no checkpoint that was validated; give --checkpoint latest"
            )
        folder = pointer.with_name(read_json(pointer)["folder"])
    fault = checkpoint.damage(folder)
    if fault:
        raise ConfigurationError(f"{folder}: is damaged ({fault}); give another checkpoint of that run")
    return folder
