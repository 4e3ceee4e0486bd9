"""The model card of an exported run: model, training, validation losses, how to load and use it, and its limits."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.flags import typed
from megatron.config.parametrization import PARAMETRIZATION_FIELDS
from megatron.config.sections import SECTIONS, ModelConfig
from megatron.config.sizes import parameter_count
from megatron.objectives.registry import OBJECTIVES, capabilities
from megatron.training.load_run import Trained
from megatron.training.run_folder import read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _fields_but(section: str, *names: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(SECTIONS[section]) if field.name not in names)


# fields of each section that the card lists where they differ from their default
OPTIONS = {
    "model": (
        *("attention_dropout", "hidden_dropout", "mlp_dropout", "embedding_dropout", "label_smoothing", "z_loss"),
        *("softmax_over_padding", "init_method_std", "num_loops", "loop_layers"),
        *PARAMETRIZATION_FIELDS,
    ),
    "data": ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"),
    "objective": _fields_but("objective", "objective"),
    "optimizer": _fields_but("optimizer", "optimizer", "lr", "weight_decay"),
    "distillation": _fields_but("distillation", "teacher"),
}
MEANING = "Losses are in nats per token, ± the standard error over documents"
LOAD = """\
```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
CAUSAL_USE = """\
`lm_eval run --model hf --model_args pretrained={name} --tasks ...` evaluates it. Training documents are
separated by `{end}`, which also serves as the context of a text without one.
"""
MASKED_USE = """\
Replace unknown tokens by `{mask}` (id {mask_id}), any number at a time; the output at a masked position predicts the
token at that position, not the next one. The model takes no diffusion time. The tokenizer reads `{mask}` and all other
special tokens as plain text unless it gets `split_special_tokens=False`. As in training, leave the last logit, that of
`{mask}`, out of the softmax:

```python
ids = tokenizer("Replace what is{mask}", split_special_tokens=False, return_tensors="pt")
probabilities = model(**ids).logits[..., :{mask_id}].softmax(-1)
```

The pipeline `fill-mask` does the same, but includes the logit of `{mask}` in its softmax: its scores are lower, and
`{mask}` may be among its answers:

```python
from transformers import pipeline

fill = pipeline("fill-mask", "{name}", tokenizer_kwargs={{"split_special_tokens": False}})
answers = fill("Replace what is{mask}")
```

No causal class of transformers loads it, and left-to-right likelihoods are not comparable with the losses above. To
evaluate, score or sample it with its training objective, convert it back to a run:

```bash
python tools/convert_checkpoint.py from-hf {name} --output runs/{name}
python pretrain_mdm.py --skip-train --load runs/{name} --num-mc 32
python tools/generate.py runs/{name} --prompt "..." --steps 64
python -m megatron.scoring.lm_eval_cli --pretrained runs/{name} --tasks hellaswag
```
"""


def model_card(
    trained: Trained, tokenizer: "PreTrainedTokenizerFast", *, name: str, kind: str, average: bool, dtype: str
) -> str:
    """Return the README.md of an exported run: `name` is its title, `kind` its class in transformers."""
    masked = kind.endswith("MaskedLM")
    auto = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask" if masked else "text-generation",
        "tags": "[data-constrained, " + ("masked-diffusion]" if masked else "autoregressive]"),
    }
    use = CAUSAL_USE.format(name=name, end=tokenizer.eos_token)
    if masked:
        use = MASKED_USE.format(name=name, mask=tokenizer.mask_token, mask_id=trained.vocabulary.mask_id)
    sections = [
        "---\n" + "".join(f"{key}: {value}\n" for key, value in front.items()) + "---",
        f"# {name}",
        _summary(trained, kind, average, dtype),
        "## Training",
        "\n".join(f"* {line}" for line in _training(trained)),
        "## Validation",
        "\n".join(_validation(trained, average)),
        "## Use",
        LOAD.format(auto=auto, name=name),
        use,
        "## Limits",
        "\n".join(f"* {line}" for line in _limits(trained, masked)),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _summary(trained: Trained, kind: str, average: bool, dtype: str) -> str:
    model, meta = trained.config.model, trained.meta
    weights = "the average of its weights" if average else "its weights"
    parameters = parameter_count(model.unrolled, trained.vocabulary)
    text = (
        f"A `{kind}` with {parameters / 1e6:.2f}M parameters, padded vocabulary rows included: "
        f"{model.depth} layers of width {model.hidden_size}, {model.num_attention_heads} heads. These are "
        f"{weights} after step {meta['iteration']:,}, in {dtype}."
    )
    return f"{text} {unrolling(model)}" if model.num_loops > 1 else text


def unrolling(model: ModelConfig) -> str:
    """Return a sentence that says how the layers of an export repeat the blocks of a model with loops."""
    loop = model.loop_range
    return (
        f"The run has {model.num_layers} blocks, of which {loop[0]} to {loop[-1]} run {model.num_loops} times with the "
        f"same weights (`--num-loops`); here each use is a layer with a copy of them, {model.depth} in all."
    )


def _training(trained: Trained) -> Iterator[str]:
    recorded, config = trained.recorded, trained.config
    samples, passes = trained.meta["consumed_samples"], recorded["plan"].get("passes", 1)
    tokens = samples * config.data.seq_length
    source = recorded["corpus_source"]
    yield f"Objective: {OBJECTIVES[recorded['objective_name']].title} (`--objective {recorded['objective_name']}`)"
    if "imported" in recorded:
        yield f"Imported from {recorded['imported']['source']}; the figures below do not include training before that"
    elif recorded["branched_from"]:
        yield f"Branched from {recorded['branched_from']}"
    if recorded["unique_tokens"]:
        sources = source if isinstance(source, str) else ", ".join(source)
        yield f"Data: {sources}, corpus hash `{recorded['corpus_hash']}`"
        yield (
            f"Unique tokens: {recorded['unique_tokens']:,}, {tokens / recorded['unique_tokens']:.2f} epochs: "
            f"{tokens:,} tokens in samples of {config.data.seq_length}"
        )
    else:
        yield "Data: unknown"
    yield f"Compute: {6.0 * trained.computed_parameters * tokens * passes:.3g} FLOPs (6ND, the embedding counted once)"
    for teacher in recorded.get("teachers", []):
        run = Path(teacher["checkpoint"]).parents[1].name
        yield (
            f"Distilled from {run}, step {teacher['iteration']:,}: {teacher['parameters'] / 1e6:.2f}M parameters, "
            f"weights `{teacher['weights']}`, {teacher['flops']:.3g} FLOPs"
        )
    options = list(_options(trained)) or ["none"]
    yield f"Regularisers and other options that are not at their default: {', '.join(options)}"
    optimizer = config.optimizer
    yield (
        f"Optimizer: {optimizer.optimizer}, peak learning rate {optimizer.lr:g}, weight decay "
        f"{optimizer.weight_decay:g}, batches of {config.training.global_batch_size} samples, "
        f"seed {config.training.seed}"
    )
    yield f"Precision: {recorded['precision']}; code: {recorded['commit'] or 'unknown commit'}"


def _options(trained: Trained) -> Iterator[str]:
    for section, names in OPTIONS.items():
        settings = getattr(trained.config, section)
        defaults = {field.name: field.default for field in fields(settings)}
        for name in names:
            if getattr(settings, name) != defaults[name]:
                yield f"`{typed(name, getattr(settings, name))}`"


def _validation(trained: Trained, average: bool) -> Iterator[str]:
    records = validation_records(trained, average)
    if not records:
        yield "This checkpoint was not validated."
        return
    yield "| set | loss | evaluation noise | bits per byte | alignment |"
    yield "|---|---|---|---|---|"
    has_bounds = False
    for record in records:
        bound = record.get("bound", record["mc_se"] is not None)  # older records only have their noise
        has_bounds |= bound
        sign = "≤ " if bound else ""
        bits = record["bits_per_byte"]
        error = f" ± {record['data_se']:.4f}" if record["data_se"] else ""
        noise = "unknown, one Monte-Carlo sample" if bound else "none"
        if record["mc_se"]:
            noise = f"± {record['mc_se']:.4f} from {record['num_mc']} Monte-Carlo samples"
        yield (
            f"| {record['set']} | {sign}{record['loss']:.4f}{error} | {noise} | "
            f"{f'{sign}{bits:.4f}' if bits else '-'} | {record['alignment']} |"
        )
    yield ""
    explanation = (
        " ≤: an upper bound of the negative log-likelihood, estimated with random masks." if has_bounds else ""
    )
    yield f"{MEANING}.{explanation}"


def validation_records(trained: Trained, average: bool | None = None) -> list[dict]:
    """Return the validation records at this checkpoint: of the averaged (True) or model weights (False), or both."""
    run_folder = trained.checkpoint.resolve().parents[1]
    iteration = trained.meta["iteration"]
    records = [
        record
        for record in read_records(run_folder, iteration)
        if record["kind"] == "valid" and record["iteration"] == iteration
    ]
    return [record for record in records if average in (None, record["set"].endswith(".average"))]


def _limits(trained: Trained, masked: bool) -> Iterator[str]:
    config = trained.config
    yield f"It was trained on sequences of at most {config.data.seq_length} tokens."
    if "imported" not in trained.recorded:  # earlier training is unknown
        yield "It was trained on the data above only, for the number of epochs given there."
    yield "It was not trained to follow instructions, and its output has not been checked for truth or harm."
    if config.model.softmax_over_padding:
        yield (
            "Its losses above come from a softmax that includes the unused rows of the padded vocabulary; this export "
            "leaves them out, so its losses are slightly lower."
        )
    limits = capabilities(trained.recorded["objective_name"]).export_limits
    if limits:
        yield limits
    if masked:
        yield "Its loss is an upper bound; do not compare it with exact losses as if it were exact."
