"""Recipes: defaults of many flags at once, which every flag that is given wins over.

`default` is what the sections say. `published` is the published system of 2507.15857: what its scripts pass, and what
its parser assumes where they say nothing, such as a dropout of 0.1 in all runs. It keeps the mathematics and not the
faults: noise still differs between processes and between epochs, and every validation reads the same windows with the
same noise, in exact counts of masked tokens.
"""

RECIPES: dict[str, dict] = {
    "default": {},
    "published": {
        "softmax_over_padding": True,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "embedding_dropout": 0.1,  # its --hidden-dropout acts on the embedded tokens too
        "seq_length": 2048,
        "epoch_order": "megatron",
        "tokenizer_type": "GPT2BPETokenizer",
        "num_workers": 2,
        "mask_times": "iid",
        "mask_eps": 1e-3,
        "lr": 2e-4,
        "lr_decay_style": "cosine",
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "clip_grad": 1.0,
        "micro_batch_size": 8,
        "global_batch_size": 256,
        "seed": 1234,
        "bf16": True,
        "log_interval": 10,
        "eval_interval": 1000,
        "eval_samples": 2560,
        "eval_alignment": "published",
        "num_mc": 1,
        "save_interval": 1000,
    },
}
