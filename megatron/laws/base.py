"""The parts of every scaling law: the table of runs, a form L(N, U, D), and a law, which is a form with values.

N parameters, U unique tokens, D training tokens, epochs D / U, L loss in nats per token. A run with D < U has seen D
unique tokens and none twice, so that forms use min(U, D) unique tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar

import numpy as np

from megatron.errors import ConfigurationError
from megatron.laws.compute import PLAIN, Compute

LOWEST_LOG_LOSS = -700.0  # of a law whose terms all vanish; exp() of it is still positive
LONGEST_SAMPLE = 0.01  # of the unique tokens: a sample of unknown length


def counted_epochs(tokens: np.ndarray, unique_tokens: np.ndarray, sample_tokens: float) -> np.ndarray:
    """Return epochs D / U, whole for a run that ends less than a sample before the end of an epoch. [R]

    Runs read whole samples: --train-epochs e makes D the largest multiple of a sample that is at most e U.
    `sample_tokens` are the tokens of a sample; 0 if they are not known, and LONGEST_SAMPLE of U counts as one.
    """
    epochs = tokens / unique_tokens
    missing = np.ceil(epochs) * unique_tokens - tokens
    return np.where(missing < (sample_tokens or LONGEST_SAMPLE * unique_tokens), np.ceil(epochs), epochs)


@dataclass(frozen=True, eq=False)
class Points:
    """Where a law is evaluated: R points (N, U, D), float arrays of equal length."""

    parameters: np.ndarray  # [R] N
    unique_tokens: np.ndarray  # [R] U
    tokens: np.ndarray  # [R] D, training tokens

    def __len__(self) -> int:
        return len(self.parameters)

    @cached_property
    def epochs(self) -> np.ndarray:
        """Epochs D / U; below 1 for a run that ends before it has seen all unique tokens. [R]"""
        return self.tokens / self.unique_tokens

    @cached_property
    def extra_epochs(self) -> np.ndarray:
        """Repetitions R = D / min(U, D) - 1, the epochs after the first. [R]"""
        return np.maximum(self.epochs, 1.0) - 1.0

    @cached_property
    def log_parameters(self) -> np.ndarray:
        """Return log N. [R]"""
        return np.log(self.parameters)

    @cached_property
    def log_unique(self) -> np.ndarray:
        """Return log min(U, D). [R]"""
        return np.log(np.minimum(self.unique_tokens, self.tokens))

    @cached_property
    def log_tokens(self) -> np.ndarray:
        """Return log D. [R]"""
        return np.log(self.tokens)

    @cached_property
    def log_extra_epochs(self) -> np.ndarray:
        """Return log R, -inf without repetition. [R]"""
        with np.errstate(divide="ignore"):
            return np.log(self.extra_epochs)


@dataclass(frozen=True, eq=False)
class LawTable(Points):
    """Runs to which a form is fitted: R rows of points and losses, and where they come from.

    Rows of one group are runs that differ in their seed only; a bootstrap draws whole groups.
    """

    loss: np.ndarray  # [R] nats per token
    group: np.ndarray  # [R] int
    source: str = ""  # the file, as it is printed with a fit
    filters: tuple[str, ...] = ()  # conditions that chose the rows, as typed
    notes: tuple[str, ...] = ()  # on groups and compute, printed with a fit
    sample_tokens: float = 0.0  # of the longest sample; 0 if not known
    compute: Compute = PLAIN

    def __post_init__(self):
        lengths = {len(getattr(self, name)) for name in ("parameters", "unique_tokens", "tokens", "loss", "group")}
        assert len(lengths) == 1, lengths

    @property
    def counted_epochs(self) -> np.ndarray:
        """Epochs of the runs, as `counted_epochs` has them. [R]"""
        return counted_epochs(self.tokens, self.unique_tokens, self.sample_tokens)

    @property
    def unique_read(self) -> np.ndarray:
        """Unique tokens that each run has read: D of a run shorter than an epoch, else U. [R]"""
        return np.where(self.counted_epochs < 1, self.tokens, self.unique_tokens)

    @property
    def budgets(self) -> np.ndarray:
        """The distinct numbers of unique tokens that runs have read, ascending."""
        return np.unique(self.unique_read)

    @property
    def num_distinct(self) -> int:
        """The number of runs that differ in more than their seed: of groups, or of points (N, U, D) if fewer."""
        points = np.stack([self.parameters, self.unique_tokens, self.tokens])
        return min(len(np.unique(self.group)), len(np.unique(points, axis=1).T))

    def select(self, mask: np.ndarray) -> "LawTable":
        """Return the rows where `mask` [R] is true, or the rows of an array of indices."""
        names = ("parameters", "unique_tokens", "tokens", "loss", "group")
        return replace(self, **{name: getattr(self, name)[mask] for name in names})


class Form(ABC):
    """A formula L(N, U, D) with named parameters, its source, its gradient and where fits of it start.

    All parameters are positive, and fits work on their logarithms `theta`, of shape [P] or [S, P] for S parameter
    vectors at once.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # public names, in the order of theta
    published: ClassVar[Mapping[str, float]] = {}  # constants of the source, where it gives them
    base: ClassVar[tuple[str, ...]] = ()  # parameters that a fit without repetition gives: those of --base
    across_budgets: ClassVar[tuple[str, ...]] = ()  # parameters that need runs of several numbers of unique tokens
    models_repetition: ClassVar[bool] = True  # False: repeated tokens count as new ones
    vanishing: ClassVar[tuple[str, ...]] = ("E",)  # parameters that may be 0
    # Values of each parameter in the grid of starts. Those of `losses` are in units of the lowest loss of the table,
    # those of `amplitudes` are values of their term at the centre of the table.
    grid: ClassVar[Mapping[str, Sequence[float]]]
    losses: ClassVar[tuple[str, ...]] = ("E", "A", "B")
    # parameter -> the power laws it is multiplied with: (attribute of Points, sign, name or value of the exponent)
    amplitudes: ClassVar[Mapping[str, Sequence[tuple[str, int, str | float]]]] = {
        "A": (("log_parameters", -1, "alpha"),),
        "B": (("log_tokens", -1, "beta"),),
    }

    @abstractmethod
    def log_loss_and_gradient(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., R] and its gradient with respect to theta [..., P, R], for theta [..., P]."""

    def log_loss(self, theta: np.ndarray, points: Points) -> np.ndarray:
        """Return log L [..., R] for theta [..., P]."""
        return self.log_loss_and_gradient(theta, points)[0]

    def minimum_rows(self, frozen: Collection[str] = ()) -> int:
        """Return the fewest distinct runs of a fit: two more than fitted parameters, so that residuals exist."""
        return len(set(self.parameters) - set(frozen)) + 2

    def internal(self, values: Mapping[str, float]) -> np.ndarray:
        """Return theta [P] of public values; 0 becomes -inf."""
        with np.errstate(divide="ignore"):
            return np.log([float(values[name]) for name in self.parameters])

    def public(self, theta: np.ndarray) -> dict[str, float]:
        """Return the public values of theta [P]."""
        return dict(zip(self.parameters, np.exp(theta).tolist(), strict=True))

    def check_names(self, names: Sequence[str], flag: str) -> None:
        """Check that the form has these parameters.

        Raises: ConfigurationError for an unknown name; the message has the names.
        """
        for name in names:
            if name not in self.parameters:
                raise ConfigurationError(
                    f"{flag} {name}: no parameter of the form {self.name}; it has {', '.join(self.parameters)}"
                )

    def starts(self, table: LawTable, frozen: Mapping[str, float]) -> np.ndarray:
        """Return the starts of a fit as theta [S, P]: every combination of the grid, frozen parameters as given."""
        axes = [(frozen[name],) if name in frozen else self.grid[name] for name in self.parameters]
        values = dict(zip(self.parameters, np.array(list(product(*axes))).T, strict=True))  # name -> [S]
        free = [name for name in self.parameters if name not in frozen]
        for name in self.losses:
            if name in free:
                values[name] = values[name] * table.loss.min()
        for name, powers in self.amplitudes.items():
            for variable, sign, exponent in powers if name in free else ():
                centre = getattr(table, variable)
                centre = centre[np.isfinite(centre)].mean() if np.isfinite(centre).any() else 0.0
                power = values[exponent] if isinstance(exponent, str) else exponent
                values[name] = values[name] * np.exp(-sign * power * centre)
        with np.errstate(divide="ignore"):
            return np.log(np.stack([values[name] for name in self.parameters], axis=-1))


@dataclass(frozen=True, eq=False)
class Law:
    """A form with values of its parameters, and the bootstrap's parameter vectors if it was fitted with one."""

    form: Form
    theta: np.ndarray  # [P] logarithms of the values
    draws: np.ndarray | None = None  # [B, P] theta of bootstrap resamples
    notes: Mapping[str, Any] = field(default_factory=dict)  # table, filters, base: printed with every answer
    compute: Compute = PLAIN  # of the runs

    @property
    def values(self) -> dict[str, float]:
        """Public name -> value."""
        return self.form.public(self.theta)

    def loss(self, parameters, unique_tokens, tokens) -> np.ndarray:
        """Return the loss in nats per token at N parameters, U unique and D training tokens; arrays broadcast."""
        arrays = np.broadcast_arrays(*(np.asarray(value, dtype=float) for value in (parameters, unique_tokens, tokens)))
        points = Points(*(array.reshape(-1) for array in arrays))
        with np.errstate(over="ignore"):  # of draws and points far from all runs
            return np.exp(self.form.log_loss(self.theta, points)).reshape(arrays[0].shape)

    def resampled(self) -> "list[Law]":
        """Return the laws of the bootstrap's resamples; [] without a bootstrap."""
        return [] if self.draws is None else [replace(self, theta=theta, draws=None) for theta in self.draws]

    def to_json(self) -> dict:
        """Return what `from_json` reads: form, equation, values, compute, and draws as lists of values."""
        record = {
            "form": self.form.name,
            "equation": self.form.equation,
            "source": self.form.source,
            "values": self.values,
            "notes": dict(self.notes),
        }
        if computed := self.compute.to_json():
            record["computed_parameters"] = computed
        if self.draws is not None:
            record["draws"] = np.exp(self.draws).tolist()
        return record


def columns(theta: np.ndarray) -> list[np.ndarray]:
    """Return the P parameters of theta [..., P] as arrays [..., 1], which broadcast against the points of a table."""
    return [theta[..., index, None] for index in range(theta.shape[-1])]


def stack(gradient: Mapping[int, Any] | Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return the P derivatives of a quantity of `shape` [..., R], which may be scalars, as one array [..., P, R]."""
    return np.stack([np.broadcast_to(np.asarray(part, dtype=float), shape) for part in gradient], axis=-2)


def log_sum(terms: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of a sum of terms, and its gradient.

    Each term is its logarithm [..., R], -inf where it is 0, and the gradient of that logarithm [..., P, R].
    """
    logs = np.stack([log for log, _ in terms])  # [T, ..., R]
    peak = np.maximum(logs.max(axis=0), LOWEST_LOG_LOSS)
    shares = np.exp(logs - peak)
    total = np.maximum(shares.sum(axis=0), np.finfo(float).tiny)
    shares /= total
    gradient = sum(share[..., None, :] * part for share, (_, part) in zip(shares, terms, strict=True))
    return peak + np.log(total), np.asarray(gradient)
