#!/usr/bin/env python3
"""Check that hyperparameters transfer: the change of every activation must not depend on the width of the model.

    python tools/coordinate_check.py --num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 64 \\
        --global-batch-size 8 --lr 4e-3 --parametrization mup --base-hidden-size 128 --widths 128 256 512 1024

It takes the flags of a training run (pretrain_gpt.py, pretrain_mdm.py) but no data: the model, which --hidden-size
describes, is trained for a few steps on the same random text at each of --widths, with a multiple of its heads (of
their dimension, with --base-kv-channels), or at each of --depths. The table has the root mean square change of a
coordinate since initialisation after the last step, in the residual stream and in the logits, and its slope: the
exponent of the size in a power law. It is flat with --parametrization mup (in depth with completep), but for the noise
of small models; with the standard parametrization it grows. The last line is the verdict, and the exit code 1 if it is
not flat. Source: Yang et al., Tensor Programs V (2203.03466), appendix D.1.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

import numpy as np

from megatron.config.flags import flag, require
from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.parametrization import standard_settings
from megatron.config.sections import Config, ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.objectives.registry import capabilities, document_rules
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.reporting.figures import Curve, Figure, seed_curve
from megatron.reporting.plots import draw
from megatron.training.command_line import parse_with
from megatron.training.coordinate_check import ACTIVATIONS, changes, slope, with_width
from megatron.training.environment import prepare_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes: widths or depths, steps, seeds."""

    widths: tuple[int, ...] = flag((), "hidden sizes to check, at least two")
    depths: tuple[int, ...] = flag((), "numbers of blocks to check, at least two; in place of --widths")
    check_steps: int = flag(5, "training steps")
    check_seeds: int = flag(3, "seeds of weights and noise, from --seed on")
    flat_slope: float = flag(0.15, "largest slope, in absolute value, that counts as flat", metavar="P")
    with_standard: bool = flag(False, "also print and draw the standard parametrization, for comparison")
    check_vocabulary: int = flag(256, "number of token ids of the random text")
    output: str | None = flag(None, "also write the figure, as PREFIX.svg and PREFIX.png", metavar="PREFIX")

    def __post_init__(self):
        given = [name for name in ("widths", "depths") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigurationError("--widths and --depths: a check varies one of the two; give one of them")
        sizes = getattr(self, given[0])
        require(min(sizes) >= 1 and len(set(sizes)) >= 2, given[0], sizes, "must be at least two different sizes")
        for name in ("check_steps", "check_seeds", "check_vocabulary"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"{folder} is not a folder; create it first")

    @property
    def axis(self) -> str:
        """What varies."""
        return "width" if self.widths else "depth"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The widths or depths."""
        return tuple(sorted({*self.widths, *self.depths}))


def check(config: Config) -> None:
    """Refuse layouts of several ranks, DeepSpeed, and teachers.

    Raises: ConfigurationError
    """
    message = "keeps weights in flat pieces, and the check reads them by name; leave it out"
    require(not config.parallel.deepspeed, "deepspeed", True, message)
    message = "has no effect on the check, which has random text; leave it out"
    require(not config.distillation.teacher, "teacher", config.distillation.teacher, message)
    check_layout(config, 1)
    check_batch(config, 1, capabilities(config.objective.objective))


def measure(options: Options, config: Config) -> np.ndarray:
    """Return the changes after the last step, [seeds, sizes, activations]."""
    ranks = initialize_parallel()
    prepare_device(config, ranks.device)
    vocabulary = Vocabulary(options.check_vocabulary)
    documents = document_rules(config.data, config.objective, eod=0)
    result = []
    for seed in range(config.training.seed, config.training.seed + options.check_seeds):
        training = replace(config.training, seed=seed)
        for size in options.sizes:
            model = with_width(config.model, size) if options.widths else replace(config.model, num_layers=size)
            sized = replace(config, model=model, training=training)
            result.append(changes(sized, vocabulary, ranks, documents=documents, steps=options.check_steps)[-1])
    return np.array(result).reshape(options.check_seeds, len(options.sizes), len(ACTIVATIONS))


def slopes(sizes: tuple[int, ...], measured: np.ndarray) -> dict[str, float]:
    """Return the slope of each activation, of the geometric mean over seeds.

    `measured` is [seeds, sizes, activations].
    """
    means = np.exp(np.log(measured).mean(axis=0))  # [sizes, activations]
    return {activation: slope(sizes, means[:, index]) for index, activation in enumerate(ACTIVATIONS)}


def table(options: Options, name: str, measured: np.ndarray) -> str:
    """Return the changes of one parametrization as a Markdown table."""
    means = np.exp(np.log(measured).mean(axis=0))
    lines = [f"| {name}, {options.axis} | {' | '.join(map(str, options.sizes))} | slope |"]
    lines.append("|---|" + "---|" * (len(options.sizes) + 1))
    for index, (activation, exponent) in enumerate(slopes(options.sizes, measured).items()):
        values = " | ".join(f"{value:.4g}" for value in means[:, index])
        lines.append(f"| {activation} | {values} | {exponent:+.2f} |")
    return "\n".join(lines)


def figure(options: Options, measured: dict[str, np.ndarray], objective: str) -> Figure:
    """Return the changes against the size; the standard parametrization is dashed where there is another."""
    curves: list[Curve] = []
    for name, values in measured.items():
        for index, activation in enumerate(ACTIVATIONS):
            curve = seed_curve(np.array(options.sizes, dtype=float), values[:, :, index], label=name, series=activation)
            curves.append(replace(curve, markers=True, dashed=name == "standard" and len(measured) > 1))
    dashed = "Dashed: standard. " if len(measured) > 1 else ""
    return Figure(
        name=Path(options.output or "").name,
        title=f"Coordinate check of {' and '.join(measured)}, {objective}, {options.check_steps} steps",
        x_label="hidden size" if options.widths else "blocks",
        y_label="root mean square change of a coordinate",
        curves=curves,
        note=f"{dashed}Bands: from the lowest to the highest seed.",
        log_y=True,
    )


def verdict(options: Options, name: str, measured: np.ndarray) -> tuple[bool, str]:
    """Return whether the changes are flat, and the line that says so."""
    steep = {
        activation: p for activation, p in slopes(options.sizes, measured).items() if not abs(p) <= options.flat_slope
    }
    if not steep:
        return True, f"{name}: flat in {options.axis}, all slopes are within {options.flat_slope:g} of 0"
    listed = ", ".join(f"{activation} {p:+.2f}" for activation, p in steep.items())
    return (
        False,
        f"{name}: not flat in {options.axis}, these slopes are not within {options.flat_slope:g} of 0: {listed}",
    )


def main() -> None:
    """Check one configuration."""
    configure_logging()
    try:
        options, config = parse_with(Options, __doc__, sys.argv[1:], shown=("model", "optimizer", "training"))
        check(config)
        configs = {config.model.parametrization: config}
        if options.with_standard:
            settings = {name: getattr(config.model, name) for name in ModelConfig.__dataclass_fields__}
            configs |= {"standard": replace(config, model=ModelConfig(**standard_settings(settings)))}
        measured = {name: measure(options, checked) for name, checked in configs.items()}
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    finally:
        destroy_parallel()
    print("\n\n".join(table(options, name, values) for name, values in measured.items()))
    if options.output:
        draw(figure(options, measured, config.objective.objective), Path(options.output).parent)
    verdicts = [verdict(options, name, values) for name, values in measured.items()]
    print("\n" + "\n".join(line for _, line in verdicts[::-1]))
    sys.exit(0 if verdicts[0][0] else 1)


if __name__ == "__main__":
    stop_signals.run_tool(main)
