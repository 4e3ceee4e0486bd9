"""Flags of Megatron-LM, Megatron-DeepSpeed, DeepSpeed and the published fork that this project spells otherwise.

Each is the same as flags of ours, accepted without effect (told in one line, with the reason), or refused with the
reason: none is ignored in silence. What both spell alike stands in `sections.py` and not here.
"""

import logging
from dataclasses import dataclass

from megatron.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Same:
    """The same as `words`, which take its place; its value follows them unless they end in one, or it is a `switch`.

    With `batches` its value counts batches and ours counts samples.
    """

    words: str
    batches: bool = False
    switch: bool = False


@dataclass(frozen=True)
class Idle:
    """Accepted without effect; with `only`, just these values are, and any other is refused for `otherwise`.

    A value is required where `takes_value`, and may be given where `may_take_value`.
    """

    reason: str
    takes_value: bool = False
    only: tuple[str, ...] = ()
    otherwise: str = ""
    may_take_value: bool = False


@dataclass(frozen=True)
class Refused:
    """Refused: `reason` is the rest of the sentence that the flag begins."""

    reason: str


def idle(names: str, reason: str) -> dict:
    """Switches without effect."""
    return {name: Idle(reason) for name in names.split()}


def idle_value(names: str, reason: str, only: str = "", otherwise: str = "") -> dict:
    """Flags with one value and without effect."""
    return {name: Idle(reason, True, tuple(only.split()), otherwise) for name in names.split()}


def refused(names: str, reason: str) -> dict:
    return {name: Refused(reason) for name in names.split()}


def later(names: str, part: str) -> dict:
    return refused(names, f"is not available yet ({part}); leave it out")


def one_table(*groups: dict) -> dict:
    """Return all groups as one; raise TypeError where two of them claim one flag."""
    table = {}
    for group in groups:
        if twice := table.keys() & group.keys():
            raise TypeError(f"claimed twice: {', '.join(twice)}")
        table |= group
    return table


KERNELS = "kernels are chosen by PyTorch, for the same result"
SPLIT = "is not supported: between layers activations are always split over the tensor-parallel ranks; leave it out"
PLAIN = "without --deepspeed and --deepspeed-config"
EXPERTS = "there are no mixtures of experts"
ENGINE = "data parallelism is FSDP2, or DeepSpeed's with --deepspeed"
MASK_ROW = "[MASK] is the id after the tokenizer's, and there are no others"
TABLE = one_table(
    {
        "--data-path": Same("--train-data-path"),
        "--deterministic-mode": Same("--deterministic", switch=True),
        "--disable-bias-linear": Same("--no-add-bias-linear", switch=True),
        "--encoder-num-layers": Same("--num-layers"),
        "--encoder-seq-length": Same("--seq-length"),
        "--eval-iters": Same("--eval-samples", batches=True),
        "--layernorm-epsilon": Same("--norm-epsilon"),
        "--low-noise-iter": Same("--low-noise-samples", batches=True),
        "--lr-decay-iters": Same("--lr-decay-samples", batches=True),
        "--lr-warmup-iters": Same("--lr-warmup-samples", batches=True),
        "--lr-wsd-decay-iters": Same("--lr-wsd-decay-samples", batches=True),
        "--num-key-value-heads": Same("--group-query-attention --num-query-groups"),
        "--rotary-position-embeddings-theta": Same("--rotary-base"),
        "--use-distributed-optimizer": Same("--zero-stage 1"),
        "--deepspeed_config": Same("--deepspeed-config"),
        "--recompute-activations": Same("--recompute-granularity selective"),
        "--checkpoint-activations": Same("--recompute-granularity full"),
        "--cpu-optimizer": Same("--cpu-offload", switch=True),
    },
    # ---------------------------------------------------------------- network
    idle("--use-rotary-position-embeddings", "positions are always rotary"),
    idle("--no-position-embedding", "there are no learned positions"),
    idle_value("--position-embedding-type", "positions are always rotary", "rope", "is always rope; leave it out"),
    idle_value("--max-position-embeddings", "rotary positions have no largest one"),
    idle_value("--rotary-percent", "all channels are rotated", "1 1.0", "all channels are rotated; leave it out"),
    idle_value(
        "--make-vocab-size-divisible-by",
        "the multiple is always 128",
        "128",
        "the multiple is always 128; leave it out",
    ),
    idle(
        "--apply-query-key-layer-scaling --no-query-key-layer-scaling",
        "it changes no result, only the range of fp16, which is not used",
    ),
    idle("--attention-softmax-in-fp32", "the softmax is always computed in fp32"),
    idle("--use-cpu-initialization", "weights are always drawn on the CPU, keyed by seed and name"),
    refused(
        "--openai-gelu --squared-relu",
        "is not supported: the MLP is SwiGLU or, with --no-swiglu, exact GELU; leave it out",
    ),
    refused("--onnx-safe", "is not supported: there is no ONNX export; leave it out"),
    refused(
        "--apply-layernorm-1p --apply-residual-connection-post-layernorm",
        "is not supported: norms come before attention and MLP, in their plain form; leave it out",
    ),
    refused(
        "--init-method-xavier-uniform",
        "is not supported: weights are drawn from N(0, --init-method-std); leave it out",
    ),
    refused("--no-initialization", "is not supported: a run starts from weights drawn by --seed; leave it out"),
    refused(
        "--decoder-num-layers --decoder-seq-length",
        "is refused: the model is a decoder without an encoder; give --num-layers and --seq-length",
    ),
    # -------------------------------------------------------------- precision
    idle("--accumulate-allreduce-grads-in-fp32", "gradients are always summed in fp32"),
    refused("--fp16", "is not supported: training computes in bf16 or fp32; give --bf16 or --fp32"),
    refused(
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
        "is refused: only fp16 needs a loss scale; leave it out",
    ),
    refused("--fp16-lm-cross-entropy", "is refused: the loss is always computed in fp32; leave it out"),
    refused(
        "--fp32-residual-connection --embedding-weights-in-fp32",
        "is not supported: blocks compute in the run's precision, norms and softmax in fp32; leave it out, or give "
        "--fp32 in place of --bf16",
    ),
    refused(
        "--fp8-e4m3 --fp8-hybrid --fp8-format --no-fp8-wgrad --fp8-margin --fp8-interval --fp8-amax-history-len "
        "--fp8-amax-compute-algo",
        "is not supported: 8-bit matrix products are torchao's; give --fp8-recipe tensorwise or rowwise",
    ),
    # ---------------------------------------------------------------- kernels
    idle(
        "--use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder "
        "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
        "--no-rope-fusion --cross-entropy-loss-fusion --no-persist-layer-norm --disable-mem-efficient-ln "
        "--no-gradient-accumulation-fusion --use-mcore-models --use-legacy-models",
        KERNELS,
    ),
    idle_value("--transformer-impl --attention-backend", KERNELS),
    # --------------------------------------------------------- parallel layout
    idle_value(
        "--context-parallel-size --ds-sequence-parallel-size",
        "it is 1 without the flag",
        "1",
        f"only 1 is available; give --tensor-model-parallel-size, which splits the sequence too, {PLAIN}",
    ),
    idle_value(
        "--expert-model-parallel-size --moe-expert-parallel-size",
        "it is 1 without the flag",
        "1",
        f"only 1 is available: {EXPERTS}; leave it out",
    ),
    refused("--model-parallel-size", f"is refused: give --tensor-model-parallel-size, {PLAIN}"),
    idle("--sequence-parallel", "the sequence is always split where --tensor-model-parallel-size is above 1"),
    refused(
        "--no-sequence-parallel",
        "is not supported: tensor-parallel ranks always split the sequence too; leave it out",
    ),
    idle("--no-pipeline-parallel", "there are as many stages as --pipeline-model-parallel-size says"),
    idle("--use-torch-fsdp2", ENGINE),
    idle(
        "--no-async-tensor-model-parallel-allreduce --no-contiguous-buffers-in-local-ddp --overlap-grad-reduce "
        "--no-scatter-gather-tensors-in-pipeline --overlap-p2p-communication --overlap-param-gather "
        "--use-ring-exchange-p2p",
        "the engine, FSDP2 or DeepSpeed, arranges its own communication",
    ),
    idle_value("--DDP-impl", ENGINE),
    idle_value("--distributed-backend", "it is nccl between GPUs and gloo between CPUs"),
    idle_value("--local-rank --local_rank", "torchrun tells it through the environment"),
    idle_value("--lazy-mpu-init --empty-unused-memory-level", "PyTorch manages devices and their memory"),
    refused(
        "--pipeline-model-parallel-split-rank --standalone-embedding-stage --force-ds-sequence-parallel",
        "is not supported: stages are consecutive layers, the embedding with the first; leave it out",
    ),
    idle_value(
        "--recompute-method",
        "--recompute-num-layers blocks of each stage recompute",
        "block",
        "is refused: each block recomputes for itself; leave it out and give --recompute-granularity full",
    ),
    refused(
        "--checkpoint-num-layers",
        "is refused: leave it out, or give --recompute-granularity full with --recompute-num-layers",
    ),
    refused("--distribute-saved-activations --distribute-checkpointed-activations", SPLIT),
    refused(
        "--enable-zbh1-pipeline --enable-zbh1-exact-semantics",
        "is refused: zero-bubble schedules give wrong gradients with sharded parameters; leave it out",
    ),
    refused("--data-parallel-random-init", "is refused: every rank starts from the same weights; leave it out"),
    # -------------------------------------------------------------- DeepSpeed
    refused("--deepspeed_mpi", "is not supported: torchrun, deepspeed or srun start a run; leave it out"),
    refused("--deepscale --deepscale_config", "is refused: give --deepspeed and --deepspeed-config"),
    refused(
        "--zero-reduce-scatter --zero-contigious-gradients --zero-reduce-bucket-size --zero-allgather-bucket-size",
        "is refused: leave it out and set it under zero_optimization in the file of --deepspeed-config",
    ),
    idle_value(
        "--remote-device",
        "it is none without the flag",
        "none",
        "is refused: leave it out and set zero_optimization.offload_param in the file of --deepspeed-config",
    ),
    refused(
        "--use-pin-memory",
        "is refused: leave it out and set pin_memory under zero_optimization.offload_optimizer in the file of "
        "--deepspeed-config",
    ),
    idle("--cpu_torch_adam --ds_fused_adam", "the optimizer is PyTorch's AdamW, on whatever device its states are"),
    refused(
        "--scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor "
        "--synchronize-each-layer --profile-backward --ds-inference --ds-sequence-parallel-fpdt "
        "--ds-sequence-parallel-fpdt-chunk-size --ds-sequence-parallel-fpdt-offloading",
        "is not supported: DeepSpeed shards the plain model by ZeRO; leave it out",
    ),
    refused(
        "--deepspeed-activation-checkpointing --partition-activations --contigious-checkpointing --checkpoint-in-cpu",
        "is refused: recomputation is PyTorch's, with DeepSpeed too; give --recompute-granularity",
    ),
    # ------------------------------------------------------- batch and budget
    refused("--batch-size", "is refused: give --micro-batch-size"),
    refused("--train-tokens", "is refused: give --train-samples, tokens / --seq-length"),
    refused("--train-data-exact-num-epochs", "is refused: leave it out, or give --train-epochs as the budget"),
    later("--rampup-batch-size", "a growing batch"),
    # --------------------------------------------------- optimizer, schedule
    refused("--sgd-momentum", "is refused: the optimizer is AdamW or, with --optimizer muon, Muon; leave it out"),
    idle("--muon-use-nesterov", "Muon's momentum is always Nesterov's"),
    idle_value("--muon-num-ns-steps", "Muon takes 5 Newton-Schulz steps", "5", "Muon takes 5 of them; leave it out"),
    idle_value("--muon-tp-mode", "Muon orthogonalises whole matrices in every layout"),
    refused("--muon-no-split-qkv", "is refused: queries, keys and values have matrices of their own; leave it out"),
    refused(
        "--muon-scale-mode --muon-extra-scale-factor",
        "is refused: Muon's updates have the size of AdamW's, 0.2 of the learning rate; leave it out",
    ),
    refused(
        "--lr-decay-tokens --lr-warmup-tokens",
        "is refused: the clock is samples; give --lr-decay-samples and --lr-warmup-samples",
    ),
    refused("--lr-warmup-fraction --warmup", "is refused: give --lr-warmup-samples, by default 1% of the budget"),
    refused(
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler --no-load-lr-state",
        "is refused: a run keeps its schedule, and a branch (--load A --save B) takes that of its flags; leave it out",
    ),
    # ------------------------------------------------------------------- data
    idle_value("--data-impl", "token files are always memory-mapped", "mmap infer", "is always mmap; leave it out"),
    idle_value("--dataloader-type", "samples come in the order of --epoch-order", "single", "give --epoch-order"),
    idle_value("--data-cache-path", "orders are computed from the seed; nothing is cached"),
    idle("--mmap-warmup", "pages are read when they are needed"),
    idle("--repeated-dataloader", "the order of samples has no end"),
    idle("--no-create-attention-mask-in-dataloader", "the model makes its attention masks where it needs any"),
    refused(
        "--test-data-path --test-data-path-file",
        "is refused: leave it out and evaluate the finished run: --skip-train --load RUN --valid-data-path test=PREFIX",
    ),
    idle_value("--vocab-extra-ids", MASK_ROW, "0", f"is not supported: {MASK_ROW}; leave it out"),
    refused(
        "--trust-remote-code",
        "is refused: no code from a hub is ever run; leave it out and give --tokenizer-model FILE",
    ),
    refused(
        "--use-dataset-only --return-data-index --train-idx-path --train-desc-path --train-doc-idx-path "
        "--train-sample-idx-path --train-shuffle-idx-path --aml-data-download-path --sample-rate "
        "--data-efficiency-curriculum-learning --random-ltd --mock-data",
        "is not supported: data are token files, read in full; leave it out",
    ),
    # ------------------------------------------------------------ checkpoints
    idle("--exit-signal-handler", "SIGTERM, SIGUSR1, SIGUSR2 and SIGINT always stop a run, and save"),
    idle("--no-load-rng --no-save-rng", "no generator is kept: noise follows from the seed and the place in the run"),
    idle("--use-checkpoint-args", "a run's settings are checked on resume, and taken with --skip-train"),
    idle("--use-dist-ckpt --auto-detect-ckpt-format", "checkpoints are safetensors"),
    idle_value("--ckpt-format --dist-ckpt-format", "checkpoints are safetensors"),
    refused("--no-save-optim", "is refused: a run could not be resumed; leave it out"),
    later("--finetune --reset-iteration", "weights without their run"),
    refused(
        "--no-load-optim",
        "is refused: a run resumes with its optimizer's state, and --skip-train reads none; leave it out",
    ),
    refused(
        "--load-tag", "is refused: --load takes the folder of a checkpoint too; give --load RUN/checkpoints/iter_N"
    ),
    idle("--async-save", "checkpoints are always written in the background"),
    idle("--universal-checkpoint", "every checkpoint can be read in any layout"),
    refused("--adlr-autoresume --adlr-autoresume-interval", "is refused: give --exit-duration-in-mins"),
    # ---------------------------------------------------------------- records
    idle("--log-validation-ppl-to-tensorboard", "validation perplexity is always written"),
    idle("--log-timers-to-tensorboard --log-throughput", "speed is in every training record"),
    idle("--log-memory-to-tensorboard", "memory is in every training record"),
    idle("--log-batch-size-to-tensorboard", "the batch never changes; config.json holds it"),
    idle("--log-world-size-to-tensorboard", "config.json holds the number of processes"),
    idle("--no-log-learnig-rate-to-tensorboard", "the learning rate is in every training record"),
    idle("--no-log-loss-scale-to-tensorboard", "there is no loss scale"),
    idle("--log-progress --no-barrier-with-level-1-timing", "status.json and metrics.jsonl tell how a run stands"),
    idle_value("--timing-log-level --timing-log-option", "speed is in every training record"),
    refused("--tensorboard-log-interval", "is refused: give --log-interval"),
    later(
        "--log-params-norm --log-num-zeros-in-grad --log-optimizer-states-to-tensorboard --profile --profile_steps "
        "--profile-ranks",
        "these records",
    ),
    # ------------------------------------------------- the fork's objectives
    # of type bool, so that a value follows it, which in the published system always means True
    {"--use-order-list": Idle("--num-order-list above 1 switches orders on", may_take_value=True)},
    refused(
        "--low-noise-start",
        "is refused: --low-noise-iter alone switches it on; leave it out and give that (1000 in the published system)",
    ),
    idle("--untie-with-additional-mask", "[MASK] always has a row of its own"),
    refused(
        "--target-random-ratio --use-target-position-embeddings --block-size --order-list",
        "is refused: it does nothing in the published system; leave it out",
    ),
    # ---------------------------------------------------------------- scoring
    refused(
        "--task_list --results_path --eval_method --eval_fp32 --only_generate --only_mc_nll --sampling_eps "
        "--max_chunk_size --adaptive_seq_len --num_fewshot --inference --inference-batch-times-seqlen-threshold "
        "--max-tokens-to-oom",
        "is refused: downstream tasks are run by python -m megatron.evaluation.harness, not by training; leave it out",
    ),
    # ---------------------------------------------------- what is left out
    refused(
        "--num-experts --num-experts-switch --mlp-type --topk --expert-interval --disable-moe-token-dropping "
        "--moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --moe-loss-coeff "
        "--create-moe-param-group --disable-moe-top2-2nd-expert-sampling --use-tutel "
        "--enable-expert-tensor-parallelism",
        f"is not supported: {EXPERTS}; leave it out",
    ),
    refused(
        "--num-layers-teacher --num-experts-teacher --hidden-size-teacher --num-attention-heads-teacher --mos --kd "
        "--kd-alpha-ce --kd-beta-ce --kd-temp --load-teacher",
        "is not supported: there is no distillation; leave it out",
    ),
    refused(
        "--retro-workdir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers "
        "--retro-encoder-hidden-dropout --retro-encoder-attention-dropout --retro-num-neighbors "
        "--retro-num-retrieved-chunks --retro-return-doc-ids --retriever-seq-length "
        "--retriever-report-topk-accuracies --retriever-score-scaling --indexer-batch-size --indexer-log-interval "
        "--ict-head-size --ict-load --biencoder-projection-dim --biencoder-shared-query-context-model "
        "--titles-data-path --evidence-data-path --block-data-path --embedding-path --query-in-block-prob "
        "--use-one-sent-docs",
        "is not supported: there is no retrieval; leave it out",
    ),
    refused(
        "--bert-no-binary-head --bert-load --output-bert-embeddings --bert-embedder-type --mask-prob --short-seq-prob",
        "is not supported: there is no BERT; leave it out, and train masked diffusion with pretrain_mdm.py",
    ),
    refused(
        "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction "
        "--no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type --vision-backbone-type "
        "--swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size "
        "--dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer "
        "--dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs",
        "is not supported: there are no vision models; leave it out",
    ),
)


# flags that Megatron spells alike, and that differ from its own
DIFFERENCES = {
    "--lr-warmup-samples, --lr-decay-samples, --lr-decay-style, --weight-decay-incr-style": (
        "learning rate and weight decay of a step follow from the samples consumed at its end, and Megatron's "
        "from those before it: our step k has the values of Megatron's step k + 1, whose first step has a rate of 0."
    ),
}
# values of our own flags that Megatron calls otherwise
VALUES = {"--optimizer": {"adam": "adamw"}}


def translate(arguments: list[str], batch: int, table: dict[str, Same | Idle | Refused] = TABLE) -> list[str]:
    """Return a command line in our own spellings, with the rules of `table`; `batch` is --global-batch-size.

    What is accepted without effect is logged and dropped. Raises ConfigurationError for what is refused.
    """
    translated, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        name, joined, value = word.partition("=")
        rule = table.get(name)
        if name in VALUES:
            given = _value(name, rest, joined, value)
            translated += [name, VALUES[name].get(given, given)]
        elif rule is None:
            translated.append(word)
        elif isinstance(rule, Refused):
            raise ConfigurationError(f"{name}: {rule.reason}")
        elif isinstance(rule, Idle):
            follows = rule.may_take_value and (joined or (rest and not rest[0].startswith("--")))
            _accept(name, rule, _value(name, rest, joined, value) if rule.takes_value or follows else None, joined)
        else:
            *words, last = rule.words.split()
            if not last.startswith("--"):
                _agree(name, *words, last, arguments)
            elif rule.batches:
                value, joined = _in_samples(name, _value(name, rest, joined, value), batch), "="
            elif not rule.switch:
                _value(name, list(rest), joined, value)  # refuses a missing one; there may be several
            translated += [*words, last + joined + value]
    return translated


def is_foreign(arguments: list[str]) -> bool:
    """Return whether a command line uses spellings of Megatron, DeepSpeed or the published system."""
    return any(word.partition("=")[0] in TABLE for word in arguments)


def _agree(name: str, flag: str, value: str, arguments: list[str]) -> None:
    """Raise ConfigurationError where `name`, which is `flag` with a value, stands beside that flag with another."""
    for word, after in zip(arguments, [*arguments[1:], ""]):
        typed, joined, given = word.partition("=")
        given = given if joined else after
        if typed == flag and given != value:
            raise ConfigurationError(f"{name}: is {flag} {value}, and {flag} {given} is given too; leave one out")


def _accept(name: str, rule: Idle, value: str | None, joined: str) -> None:
    if joined and value is None:
        raise ConfigurationError(f"{name}: takes no value; write the flag alone")
    typed = name if value is None else f"{name} {value}"
    if rule.only and value not in rule.only:
        raise ConfigurationError(f"{typed}: {rule.otherwise}")
    logger.info("%s: has no effect, %s", typed, rule.reason)


def _value(name: str, rest: list[str], joined: str, value: str) -> str:
    """Return the one value of a flag, taken from `rest` where it was not joined by =."""
    if joined:
        return value
    if not rest or rest[0].startswith("--"):
        raise ConfigurationError(f"{name}: is not followed by a value; give one")
    return rest.pop(0)


def _in_samples(name: str, value: str, batch: int) -> str:
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(f"{name} {value}: is not a whole number of batches; give one")
    return str(int(value) * batch)


def markdown() -> str:
    """Return the table as the page docs/compatibility.md."""
    lines = [
        "# Flags of Megatron and DeepSpeed",
        "",
        "Flags that are spelled as in Megatron-LM are in `--help`. These are spelled otherwise, have no effect, or",
        "are refused; a flag in neither place is unknown and refused.",
        "Written by `python -m megatron.config.compatibility`.",
        "",
        "| flag | here |",
        "|---|---|",
    ]
    rows = {name: _described(rule) for name, rule in TABLE.items()}
    for name, values in VALUES.items():
        rows |= {f"{name} {theirs}": f"the same as `{name} {ours}`" for theirs, ours in values.items()}
    lines += [f"| `{name}` | {rows[name]} |" for name in sorted(rows)]
    lines += ["", "## Spelled alike, with a difference", ""]
    for names, difference in DIFFERENCES.items():
        lines.append(f"* {', '.join(f'`{name}`' for name in names.split(', '))}: {difference}")
    return "\n".join(lines) + "\n"


def _described(rule: Same | Idle | Refused) -> str:
    if isinstance(rule, Same):
        return f"the same as `{rule.words}`" + (", times `--global-batch-size`" if rule.batches else "")
    if isinstance(rule, Refused):
        return rule.reason
    values = " or ".join(f"`{value}`" for value in rule.only)
    return f"{values + ' ' if values else ''}has no effect: {rule.reason}" + (
        f"; other values: {rule.otherwise}" if values else ""
    )


if __name__ == "__main__":
    print(markdown(), end="")
