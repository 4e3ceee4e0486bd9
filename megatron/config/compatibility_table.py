"""Table of the flags of Megatron-LM, Megatron-DeepSpeed, DeepSpeed and the published fork that are spelled otherwise.

Flags that are spelled alike are in `sections/` only.
"""

from megatron.config.compatibility_entries import NoOp, Same, later, no_op, no_op_value, one_table, refused

KERNELS = "PyTorch chooses the kernels, with the same result"
SPLIT = "not supported, activations between layers are always sharded over the tensor-parallel ranks; leave it out"
PLAIN = "without --deepspeed and --deepspeed-config"
EXPERTS = "there is no mixture of experts"
ENGINE = "data parallelism is FSDP2, or DeepSpeed's with --deepspeed"
MASK_ROW = "[MASK] is the only id after the tokenizer's"
ALIASES = {
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
}
MODEL = (
    no_op("--use-rotary-position-embeddings", "positions are always rotary"),
    no_op("--no-position-embedding", "there are no learned positions"),
    no_op_value(
        "--position-embedding-type",
        "positions are always rotary",
        "rope",
        "not supported, positions are always rotary; leave it out",
    ),
    no_op_value("--max-position-embeddings", "rotary positions have no maximum"),
    no_op_value(
        "--rotary-percent",
        "all channels are rotated",
        "1 1.0",
        "not supported, all channels are rotated; leave it out",
    ),
    no_op_value(
        "--make-vocab-size-divisible-by",
        "the multiple is always 128",
        "128",
        "not supported, the multiple is always 128; leave it out",
    ),
    no_op(
        "--apply-query-key-layer-scaling --no-query-key-layer-scaling",
        "it changes no result, only the range of fp16, which is not used",
    ),
    no_op("--attention-softmax-in-fp32", "the softmax is always computed in fp32"),
    no_op("--use-cpu-initialization", "weights are always initialised on the CPU, keyed by seed and name"),
    refused(
        "--openai-gelu --squared-relu",
        "not supported, the MLP is SwiGLU or, with --no-swiglu, exact GELU; leave it out",
    ),
    refused("--onnx-safe", "not supported, there is no ONNX export; leave it out"),
    refused(
        "--apply-layernorm-1p --apply-residual-connection-post-layernorm",
        "not supported, norms come before attention and MLP, in their plain form; leave it out",
    ),
    refused(
        "--init-method-xavier-uniform",
        "not supported, weights are initialised from N(0, --init-method-std^2); leave it out",
    ),
    refused("--no-initialization", "not supported, a run starts from weights initialised with --seed; leave it out"),
    refused(
        "--decoder-num-layers --decoder-seq-length",
        "not supported, the model is a decoder without an encoder; give --num-layers and --seq-length",
    ),
)
PRECISION = (
    no_op("--accumulate-allreduce-grads-in-fp32", "gradients are always accumulated and reduced in fp32"),
    refused("--fp16", "not supported, training computes in bf16 or fp32; give --bf16 or --fp32"),
    refused(
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
        "not supported, only fp16 needs a loss scale; leave it out",
    ),
    refused("--fp16-lm-cross-entropy", "not supported, the loss is always computed in fp32; leave it out"),
    refused(
        "--fp32-residual-connection --embedding-weights-in-fp32",
        "not supported, blocks compute in the run's precision, norms and softmax in fp32; leave it out, or give "
        "--fp32 in place of --bf16",
    ),
    refused(
        "--fp8-e4m3 --fp8-hybrid --fp8-format --no-fp8-wgrad --fp8-margin --fp8-interval --fp8-amax-history-len "
        "--fp8-amax-compute-algo",
        "not supported, FP8 matrix products are torchao's; give --fp8-recipe tensorwise or rowwise",
    ),
)
KERNEL_CHOICES = (
    no_op(
        "--use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder "
        "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
        "--no-rope-fusion --cross-entropy-loss-fusion --no-persist-layer-norm --disable-mem-efficient-ln "
        "--no-gradient-accumulation-fusion --use-mcore-models --use-legacy-models",
        KERNELS,
    ),
    no_op_value("--transformer-impl --attention-backend", KERNELS),
)
LAYOUT = (
    no_op_value(
        "--context-parallel-size --ds-sequence-parallel-size",
        "1 is the default",
        "1",
        f"not supported, only 1 is available; give --tensor-model-parallel-size, which splits the sequence too, "
        f"{PLAIN}",
    ),
    no_op_value(
        "--expert-model-parallel-size --moe-expert-parallel-size",
        "1 is the default",
        "1",
        f"not supported, {EXPERTS}; leave it out",
    ),
    refused("--model-parallel-size", f"not supported; give --tensor-model-parallel-size, {PLAIN}"),
    no_op("--sequence-parallel", "sequence parallelism is always on where --tensor-model-parallel-size is above 1"),
    refused(
        "--no-sequence-parallel",
        "not supported, tensor parallelism always includes sequence parallelism; leave it out",
    ),
    no_op("--no-pipeline-parallel", "--pipeline-model-parallel-size sets the number of stages"),
    no_op("--use-torch-fsdp2", ENGINE),
    no_op(
        "--no-async-tensor-model-parallel-allreduce --no-contiguous-buffers-in-local-ddp --overlap-grad-reduce "
        "--no-scatter-gather-tensors-in-pipeline --overlap-p2p-communication --overlap-param-gather "
        "--use-ring-exchange-p2p",
        "the engine, FSDP2 or DeepSpeed, schedules its own communication",
    ),
    no_op_value("--DDP-impl", ENGINE),
    no_op_value("--distributed-backend", "it is nccl between GPUs and gloo between CPUs"),
    no_op_value("--local-rank --local_rank", "torchrun sets it in the environment"),
    no_op_value("--lazy-mpu-init --empty-unused-memory-level", "PyTorch manages devices and their memory"),
    refused(
        "--pipeline-model-parallel-split-rank --standalone-embedding-stage --force-ds-sequence-parallel",
        "not supported, stages are consecutive layers, the embedding with the first; leave it out",
    ),
    no_op_value(
        "--recompute-method",
        "--recompute-num-layers blocks of each stage are recomputed",
        "block",
        "not supported, each block is recomputed on its own; leave it out and give --recompute-granularity full",
    ),
    refused(
        "--checkpoint-num-layers",
        "not supported; leave it out, or give --recompute-granularity full with --recompute-num-layers",
    ),
    refused("--distribute-saved-activations --distribute-checkpointed-activations", SPLIT),
    refused(
        "--enable-zbh1-pipeline --enable-zbh1-exact-semantics",
        "not supported, zero-bubble schedules give wrong gradients with sharded parameters; leave it out",
    ),
    refused("--data-parallel-random-init", "not supported, every rank starts from the same weights; leave it out"),
)
DEEPSPEED = (
    refused("--deepspeed_mpi", "not supported, torchrun, deepspeed or srun start a run; leave it out"),
    refused("--deepscale --deepscale_config", "not supported; give --deepspeed and --deepspeed-config"),
    refused(
        "--zero-reduce-scatter --zero-contigious-gradients --zero-reduce-bucket-size --zero-allgather-bucket-size",
        "not supported; leave it out and set it under zero_optimization in the file of --deepspeed-config",
    ),
    no_op_value(
        "--remote-device",
        "none is the default",
        "none",
        "not supported; leave it out and set zero_optimization.offload_param in the file of --deepspeed-config",
    ),
    refused(
        "--use-pin-memory",
        "not supported; leave it out and set pin_memory under zero_optimization.offload_optimizer in the file of "
        "--deepspeed-config",
    ),
    no_op("--cpu_torch_adam --ds_fused_adam", "the optimizer is PyTorch's AdamW, on the device of its states"),
    refused(
        "--scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor "
        "--synchronize-each-layer --profile-backward --ds-inference --ds-sequence-parallel-fpdt "
        "--ds-sequence-parallel-fpdt-chunk-size --ds-sequence-parallel-fpdt-offloading",
        "not supported, DeepSpeed shards the plain model by ZeRO; leave it out",
    ),
    refused(
        "--deepspeed-activation-checkpointing --partition-activations --contigious-checkpointing --checkpoint-in-cpu",
        "not supported, activation checkpointing is PyTorch's, with DeepSpeed too; give --recompute-granularity",
    ),
)
BUDGET = (
    refused("--batch-size", "not supported; give --micro-batch-size"),
    refused("--train-tokens", "not supported; give --train-samples, tokens / --seq-length"),
    refused("--train-data-exact-num-epochs", "not supported; leave it out, or give --train-epochs as the budget"),
    later("--rampup-batch-size", "batch size ramp-up"),
)
OPTIMIZER = (
    refused("--sgd-momentum", "not supported, the optimizer is AdamW or, with --optimizer muon, Muon; leave it out"),
    no_op("--muon-use-nesterov", "Muon's momentum is always Nesterov's"),
    no_op_value(
        "--muon-num-ns-steps",
        "Muon takes 5 Newton-Schulz steps",
        "5",
        "not supported, Muon takes 5 of them; leave it out",
    ),
    no_op_value("--muon-tp-mode", "Muon orthogonalises whole matrices in every layout"),
    refused("--muon-no-split-qkv", "not supported, queries, keys and values have separate matrices; leave it out"),
    refused(
        "--muon-scale-mode --muon-extra-scale-factor",
        "not supported, Muon's updates have the RMS of AdamW's, 0.2 times the learning rate; leave it out",
    ),
    refused(
        "--use-mup --scaling-recipe --mup-base-hidden-size --scaling-base-hidden-size --scaling-base-num-layers "
        "--mup-base-head-dim",
        "not supported, muP here scales attention only where the head dimension differs from the base model's, and "
        "every epsilon; give --parametrization with --base-hidden-size and --base-kv-channels",
    ),
    refused(
        "--mup-width-mult --mup-embedding-mult --mup-output-mult --mup-attn-scale-power",
        "not supported, the multipliers follow from the sizes of the model and of its base model; leave it out",
    ),
    refused(
        "--lr-decay-tokens --lr-warmup-tokens",
        "not supported, the schedule counts samples; give --lr-decay-samples and --lr-warmup-samples",
    ),
    refused("--lr-warmup-fraction --warmup", "not supported; give --lr-warmup-samples, by default 1% of the budget"),
    refused(
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler --no-load-lr-state",
        "not supported, a run keeps its schedule, and a branch (--load A --save B) takes the schedule of its flags; "
        "leave it out",
    ),
)
DATA = (
    no_op_value(
        "--data-impl",
        "token files are always memory-mapped",
        "mmap infer",
        "not supported, it is always mmap; leave it out",
    ),
    no_op_value(
        "--dataloader-type", "samples come in the order of --epoch-order", "single", "not supported; give --epoch-order"
    ),
    no_op_value("--data-cache-path", "the order of samples is computed from the seed; nothing is cached"),
    no_op("--mmap-warmup", "pages are read on demand"),
    no_op("--repeated-dataloader", "the order of samples is infinite"),
    no_op("--no-create-attention-mask-in-dataloader", "the model builds its attention masks"),
    refused(
        "--test-data-path --test-data-path-file",
        "not supported; leave it out and evaluate the finished run: --skip-train --load RUN --valid-data-path "
        "test=PREFIX",
    ),
    no_op_value("--vocab-extra-ids", MASK_ROW, "0", f"not supported, {MASK_ROW}; leave it out"),
    refused(
        "--trust-remote-code",
        "not supported, code from a hub is never run; leave it out and give --tokenizer-model FILE",
    ),
    refused(
        "--use-dataset-only --return-data-index --train-idx-path --train-desc-path --train-doc-idx-path "
        "--train-sample-idx-path --train-shuffle-idx-path --aml-data-download-path --sample-rate "
        "--data-efficiency-curriculum-learning --random-ltd --mock-data",
        "not supported, the data are token files, read in full; leave it out",
    ),
)
CHECKPOINTS = (
    no_op("--exit-signal-handler", "SIGTERM, SIGUSR1, SIGUSR2 and SIGINT always stop a run, and save"),
    no_op("--no-load-rng --no-save-rng", "no generator state is saved; noise is a function of seed and sample index"),
    no_op("--use-checkpoint-args", "the recorded configuration is checked on resume, and used with --skip-train"),
    no_op("--use-dist-ckpt --auto-detect-ckpt-format", "checkpoints are safetensors"),
    no_op_value("--ckpt-format --dist-ckpt-format", "checkpoints are safetensors"),
    refused("--no-save-optim", "not supported, the run could not resume; leave it out"),
    later("--finetune --reset-iteration", "weights without optimizer state and progress"),
    refused(
        "--no-load-optim",
        "not supported, a run resumes with its optimizer state, and --skip-train reads none; leave it out",
    ),
    refused(
        "--load-tag", "not supported, --load also takes the folder of a checkpoint; give --load RUN/checkpoints/iter_N"
    ),
    no_op("--async-save", "checkpoints are always written in the background"),
    no_op("--universal-checkpoint", "every checkpoint can be loaded in any parallel layout"),
    refused("--adlr-autoresume --adlr-autoresume-interval", "not supported; give --exit-duration-in-mins"),
)
RECORDS = (
    no_op("--log-validation-ppl-to-tensorboard", "validation perplexity is always written"),
    no_op("--log-timers-to-tensorboard --log-throughput", "throughput is in every training record"),
    no_op("--log-memory-to-tensorboard", "memory is in every training record"),
    no_op("--log-batch-size-to-tensorboard", "the batch size is constant, and in config.json"),
    no_op("--log-world-size-to-tensorboard", "the world size is in config.json"),
    no_op("--no-log-learnig-rate-to-tensorboard", "the learning rate is in every training record"),
    no_op("--no-log-loss-scale-to-tensorboard", "there is no loss scale"),
    no_op(
        "--log-progress --no-barrier-with-level-1-timing", "status.json and metrics.jsonl show the progress of a run"
    ),
    no_op_value("--timing-log-level --timing-log-option", "throughput is in every training record"),
    refused("--tensorboard-log-interval", "not supported; give --log-interval"),
    later(
        "--log-params-norm --log-num-zeros-in-grad --log-optimizer-states-to-tensorboard --profile --profile_steps "
        "--profile-ranks",
        "these metrics and profiles",
    ),
)
OBJECTIVES = (
    # of type bool: a value may follow, and in the published system any value means True
    {"--use-order-list": NoOp("--num-order-list above 1 enables orders", may_take_value=True)},
    refused(
        "--low-noise-start",
        "not supported, --low-noise-iter alone enables it; leave it out and give that (1000 in the published system)",
    ),
    no_op("--untie-with-additional-mask", "[MASK] always has its own embedding row"),
    refused(
        "--target-random-ratio --use-target-position-embeddings --block-size --order-list",
        "not supported, it has no effect in the published system; leave it out",
    ),
)
SCORING = (
    refused(
        "--task_list --results_path --eval_method --eval_fp32 --only_generate --only_mc_nll --sampling_eps "
        "--max_chunk_size --adaptive_seq_len --num_fewshot --inference --inference-batch-times-seqlen-threshold "
        "--max-tokens-to-oom",
        "not supported, downstream tasks are run by python -m megatron.scoring.lm_eval_cli, not by training; leave it "
        "out",
    ),
)
LEFT_OUT = (
    refused(
        "--num-experts --num-experts-switch --mlp-type --topk --expert-interval --disable-moe-token-dropping "
        "--moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --moe-loss-coeff "
        "--create-moe-param-group --disable-moe-top2-2nd-expert-sampling --use-tutel "
        "--enable-expert-tensor-parallelism",
        f"not supported, {EXPERTS}; leave it out",
    ),
    refused(
        "--num-layers-teacher --num-experts-teacher --hidden-size-teacher --num-attention-heads-teacher --mos --kd "
        "--kd-alpha-ce --kd-beta-ce --kd-temp --load-teacher",
        "not supported, a teacher is a finished run, whose model is recorded; give --teacher",
    ),
    refused(
        "--retro-workdir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers "
        "--retro-encoder-hidden-dropout --retro-encoder-attention-dropout --retro-num-neighbors "
        "--retro-num-retrieved-chunks --retro-return-doc-ids --retriever-seq-length "
        "--retriever-report-topk-accuracies --retriever-score-scaling --indexer-batch-size --indexer-log-interval "
        "--ict-head-size --ict-load --biencoder-projection-dim --biencoder-shared-query-context-model "
        "--titles-data-path --evidence-data-path --block-data-path --embedding-path --query-in-block-prob "
        "--use-one-sent-docs",
        "not supported, there is no retrieval; leave it out",
    ),
    refused(
        "--bert-no-binary-head --bert-load --output-bert-embeddings --bert-embedder-type --mask-prob --short-seq-prob",
        "not supported, there is no BERT; leave it out, and train masked diffusion with pretrain_mdm.py",
    ),
    refused(
        "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction "
        "--no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type --vision-backbone-type "
        "--swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size "
        "--dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer "
        "--dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs",
        "not supported, there are no vision models; leave it out",
    ),
)
TABLE = one_table(
    ALIASES,
    *MODEL,
    *PRECISION,
    *KERNEL_CHOICES,
    *LAYOUT,
    *DEEPSPEED,
    *BUDGET,
    *OPTIMIZER,
    *DATA,
    *CHECKPOINTS,
    *RECORDS,
    *OBJECTIVES,
    *SCORING,
    *LEFT_OUT,
)

# flags that are spelled as in Megatron and differ in meaning
DIFFERENCES = {
    "--lr-warmup-samples, --lr-decay-samples, --lr-decay-style, --weight-decay-incr-style": (
        "the learning rate and weight decay of a step are functions of the samples consumed after it, Megatron's of "
        "those consumed before it: our step k has the values of Megatron's step k + 1, whose first step has a rate of "
        "0."
    ),
}
# values of our own flags that Megatron spells differently
VALUES = {"--optimizer": {"adam": "adamw"}}
