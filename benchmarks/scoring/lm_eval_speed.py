"""Requests per second of an autoregressive model under lm-eval, ours and transformers', with the same weights."""

from functools import partial
from statistics import median

import torch

from benchmarks.harness import interleave, ratios
from benchmarks.scoring.choices import NUM_CHOICES
from benchmarks.scoring.options import Options
from benchmarks.scoring.texts import passages
from megatron.training.load_run import Trained


def compare(options: Options, run: Trained) -> dict:
    """Return requests per second of both models under lm-eval, and the largest difference of their log-likelihoods."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from megatron.convert.huggingface import hugging_face_config, hugging_face_model
    from megatron.scoring.lm_eval_adapter import MegatronLM

    tokenizer = run.tokenizer()
    tokenizer_file = tokenizer.flag.removeprefix("--tokenizer-model ")
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    batch_size = 16
    ours = MegatronLM(pretrained=run.name, batch_size=batch_size, device="cpu")
    sizes = {"vocabulary_rows": run.vocabulary.size, "max_positions": run.config.data.seq_length}
    hf_config = hugging_face_config(run.config.model, **sizes)
    hf_model = hugging_face_model(run.model(), hf_config)
    theirs = HFLM(pretrained=hf_model, tokenizer=hf_tokenizer, batch_size=batch_size, device="cpu", backend="causal")
    instances = _instances(options, run)
    results = {}

    def loglikelihood(name: str, model, turn: int) -> None:
        results[name] = model.loglikelihood(instances, disable_tqdm=True)

    contestants = {
        name: partial(loglikelihood, name, model) for name, model in (("ours", ours), ("transformers", theirs))
    }
    seconds = interleave(contestants, options.rounds, torch.device("cpu"), warm_up=1).seconds
    differences = [abs(our_result[0] - hf_result[0]) for our_result, hf_result in zip(*results.values(), strict=True)]
    return {
        "requests": len(instances),
        "requests_per_second": {name: len(instances) / median(times) for name, times in seconds.items()},
        "speedup": ratios(seconds["transformers"], seconds["ours"]),
        "largest_difference": max(differences),
    }


def _instances(options: Options, run: Trained) -> list:
    """Return the requests, `NUM_CHOICES` for every document, as lm-eval represents them."""
    from lm_eval.api.instance import Instance

    tokenizer = run.tokenizer()
    text_length = options.context + NUM_CHOICES * options.answer
    instances = []
    for index, text in enumerate(passages(run, [text_length] * NUM_CHOICES * options.questions, 4)):
        context, choices = text[: options.context], text[options.context :]
        for choice_index in range(NUM_CHOICES):
            choice = choices[options.answer * choice_index :][: options.answer]
            arguments = (tokenizer.decode(context), tokenizer.decode(choice))
            metadata = ("race", index, 1)
            instances.append(
                Instance("loglikelihood", {"index": index}, arguments, idx=choice_index, metadata=metadata)
            )
    return instances
