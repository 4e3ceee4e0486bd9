"""The model card: what a folder holds, how it came to be, how to read its figures and how to load it."""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from megatron.config.flags import typed
from megatron.config.sections import SECTIONS
from megatron.training.load_run import Trained
from megatron.training.run_folder import read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# what acts in training beside the objective: by section, the fields that are on where they differ from their default
REGULARISERS = {
    "model": (
        *("attention_dropout", "hidden_dropout", "mlp_dropout", "embedding_dropout", "label_smoothing", "z_loss"),
        "softmax_over_padding",
    ),
    "data": ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"),
    "objective": tuple(field.name for field in fields(SECTIONS["objective"]) if field.name != "objective"),
    "optimizer": ("ema_decay", "average_from_samples"),
}
OBJECTIVES = {"ar": "autoregressive", "mdm": "masked diffusion", "dual": "autoregressive and masked diffusion at once"}
MEANING = "Losses are in nats per token, ± the standard error over documents"
LOAD = """\
```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
CAUSAL_USE = """\
`lm_eval run --model hf --model_args pretrained={name} --tasks ...` scores it. Texts were separated by `{end}`, which
also stands in front of a text that has no context.
"""
MASKED_USE = """\
Replace what is unknown by `{mask}` (id {mask_id}), any number of tokens at a time; the output at that position predicts
the token itself. There is no time to pass. In a text, `{mask}` and all other special tokens are read as text unless the
tokenizer gets `split_special_tokens=False`. The probabilities it was trained with leave out the last output, that of
`{mask}`:

```python
ids = tokenizer("Replace what is{mask}", split_special_tokens=False, return_tensors="pt")
probabilities = model(**ids).logits[..., :{mask_id}].softmax(-1)
```

The pipeline `fill-mask` does the same, but with the output of `{mask}` in its softmax: its scores are lower, and
`{mask}` may be among its answers:

```python
from transformers import pipeline

fill = pipeline("fill-mask", "{name}", tokenizer_kwargs={{"split_special_tokens": False}})
answers = fill("Replace what is{mask}")
```

No causal class of transformers loads it, and a score from left to right is not what the losses above are. To evaluate,
score or sample it as it was trained, make it a run again:

```bash
python tools/convert_checkpoint.py from-hf {name} --output runs/{name}
python pretrain_mdm.py --skip-train --load runs/{name} --num-mc 32
python tools/generate.py runs/{name} --prompt "..." --steps 64
python -m megatron.evaluation.harness --pretrained runs/{name} --tasks hellaswag
```
"""


def model_card(
    trained: Trained, tokenizer: "PreTrainedTokenizerFast", name: str, kind: str, average: bool, dtype: str
) -> str:
    """Return README.md of an exported run called `name`, of the class `kind` of transformers."""
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
    parts = [
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
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _summary(trained: Trained, kind: str, average: bool, dtype: str) -> str:
    model, meta = trained.config.model, trained.meta
    weights = "the average of its weights" if average else "its weights"
    return (
        f"A `{kind}` of {trained.recorded['parameters'] / 1e6:.2f}M parameters, rows that pad the vocabulary included: "
        f"{model.num_layers} layers of width {model.hidden_size}, {model.num_attention_heads} heads. These are "
        f"{weights} after step {meta['iteration']:,}, in {dtype}."
    )


def _training(trained: Trained) -> Iterator[str]:
    recorded, config = trained.recorded, trained.config
    samples, passes = trained.meta["consumed_samples"], recorded["plan"].get("passes", 1)
    tokens = samples * config.data.seq_length
    source = recorded["corpus_source"]
    yield f"Objective: {OBJECTIVES[recorded['objective_name']]} (`--objective {recorded['objective_name']}`)"
    if "imported" in recorded:
        yield f"Imported from {recorded['imported']['source']}; what follows leaves out what was trained there"
    elif recorded["branched_from"]:
        yield f"Begun from {recorded['branched_from']}"
    if recorded["unique_tokens"]:
        named = source if isinstance(source, str) else ", ".join(source)
        yield f"Data: {named}, corpus hash `{recorded['corpus_hash']}`"
        yield (
            f"Unique tokens: {recorded['unique_tokens']:,}, read {tokens / recorded['unique_tokens']:.2f} times: "
            f"{tokens:,} tokens in samples of {config.data.seq_length}"
        )
    else:
        yield "Data: unknown"
    yield f"Compute: {6.0 * recorded['parameters'] * tokens * passes:.3g} FLOPs (6ND, the embedding counted once)"
    on = list(_regularisers(trained)) or ["none"]
    yield f"Regularisers and options that are on: {', '.join(on)}"
    optimizer = config.optimizer
    yield (
        f"Optimizer: {optimizer.optimizer}, peak learning rate {optimizer.lr:g}, weight decay "
        f"{optimizer.weight_decay:g}, batches of {config.training.global_batch_size} samples, "
        f"seed {config.training.seed}"
    )
    yield f"Precision: {recorded['precision']}; code: {recorded['commit'] or 'unknown commit'}"


def _regularisers(trained: Trained) -> Iterator[str]:
    for section, names in REGULARISERS.items():
        settings = getattr(trained.config, section)
        defaults = {field.name: field.default for field in fields(settings)}
        for name in names:
            if getattr(settings, name) != defaults[name]:
                yield f"`{typed(name, getattr(settings, name))}`"


def _validation(trained: Trained, average: bool) -> Iterator[str]:
    found = validation_records(trained, average)
    if not found:
        yield "This checkpoint was not validated."
        return
    yield "| set | loss | evaluation noise | bits per byte | alignment |"
    yield "|---|---|---|---|---|"
    bounds = False
    for each in found:
        bound = each.get("bound", trained.recorded["objective_name"] != "ar")
        bounds |= bound
        sign, bits = "≤ " * bound, each["bits_per_byte"]
        error = f" ± {each['data_se']:.4f}" if each["data_se"] else ""
        noise = "none" if not bound else "unknown, from one replicate"
        if each["mc_se"]:
            noise = f"± {each['mc_se']:.4f} from {each['num_mc']} replicates"
        yield (
            f"| {each['set']} | {sign}{each['loss']:.4f}{error} | {noise} | {f'{sign}{bits:.4f}' if bits else '-'} | "
            f"{each['alignment']} |"
        )
    yield ""
    told = " ≤: an upper bound of the negative log-likelihood, estimated with random masks." if bounds else ""
    yield f"{MEANING}.{told}"


def validation_records(trained: Trained, average: bool | None = None) -> list[dict]:
    """Return what the run recorded of the validation at this checkpoint: of its weights, their average, or both."""
    run, iteration = trained.checkpoint.resolve().parents[1], trained.meta["iteration"]
    found = [each for each in read_records(run, iteration) if each["kind"] == "valid"]
    found = [each for each in found if each["iteration"] == iteration]
    return [each for each in found if average in (None, each["set"].endswith(".average"))]


def _limits(trained: Trained, masked: bool) -> Iterator[str]:
    config = trained.config
    yield f"Nothing longer than {config.data.seq_length} tokens was read in training."
    yield "It was trained on the text above only, as often as is said there, and knows nothing else."
    yield "It follows no instructions, and nobody has looked at what it says for truth or harm."
    if config.model.softmax_over_padding:
        yield (
            "Its losses above come from a softmax in which the unused rows of the padded vocabulary took part; here "
            "they are left out, so its losses are a little lower."
        )
    if trained.recorded["objective_name"] == "dual":
        yield (
            "This is its autoregressive side; its masked-diffusion side speaks of the next token, and no stock class "
            "does that."
        )
    if masked:
        yield "Its loss is a bound and not to be compared with exact losses as if it were one."
