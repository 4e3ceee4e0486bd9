"""With a KV cache, chunks, padded sequences and shared prefixes give the logits of one uncached pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer

VOCABULARY = Vocabulary(61)
VARIANTS = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2},
    "normed queries": {"qk_layernorm": True, "untie_embeddings_and_output_weights": True},
}


def build(**options):
    config = ModelConfig(**{"num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, **options})
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=1)
    return model.eval()


def draw(*shape):
    return torch.randint(VOCABULARY.size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("chunk_sizes", [(12,), (1,) * 12, (5, 1, 4, 2)], ids=str)
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(options, chunk_sizes):
    model, tokens, cache = build(**options), draw(2, 12), KVCache()
    logits = [model.head(model.read(chunk, cache)) for chunk in tokens.split(chunk_sizes, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model.logits(tokens, causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_left", [True, False])
@torch.no_grad()
def test_sequences_of_several_lengths_share_a_batch(pad_left):
    model, tokens, lengths, cache = build(), draw(3, 9), (9, 2, 5), KVCache()
    padded = torch.zeros(3, 9, dtype=torch.long)
    present = torch.zeros(3, 9, dtype=torch.bool)
    spans = [slice(9 - length, 9) if pad_left else slice(length) for length in lengths]
    for row, (span, length) in enumerate(zip(spans, lengths)):
        padded[row, span] = tokens[row, :length]
        present[row, span] = True
    logits = model.head(model.read(padded, cache, present))
    next_logits = model.head(model.read(tokens[:, :2], cache))
    for row, (span, length) in enumerate(zip(spans, lengths)):
        expected = model.logits(torch.cat((tokens[row, :length], tokens[row, :2]))[None], causal=True)[0]
        torch.testing.assert_close(logits[row, span], expected[:length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(next_logits[row], expected[length:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_shared_by_its_answers():
    model, prefixes, answers, cache = build(), draw(2, 6), draw(5, 3), KVCache()
    model.read(prefixes, cache)
    prefix_of_answer = torch.tensor([0, 1, 1, 0, 1])
    logits = model.head(model.read(answers, cache.select(prefix_of_answer)))
    expected = model.logits(torch.cat((prefixes[prefix_of_answer], answers), 1), causal=True)[:, 6:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert cache.present.shape == (2, 6), "answers must not be appended to the prefix itself"


WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class HostReads(TorchDispatchMode):
    """Lists the operators for whose result a host waits where it is on a GPU."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING:
            self.operators.append(function)
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_only_padding_is_read_by_the_host():
    model, tokens, cache = build(), draw(3, 9), KVCache()
    with HostReads() as reads:
        model.logits(tokens, causal=False)
        model.read(tokens, cache)
        cache = cache.select(torch.tensor([0, 2]))
        for token in draw(2, 4).split(1, dim=1):
            model.read(token, cache)
    assert not reads.operators
    padded = KVCache()
    with HostReads() as reads:
        model.read(tokens, padded, torch.arange(9) >= torch.tensor([[0], [3], [0]]))
        model.read(draw(3, 1), padded)
        unpadded = padded.select(torch.tensor([0, 2]))
    assert len(reads.operators) == 2
    assert unpadded.append(torch.ones(2, 1, dtype=torch.bool), True)[1] is None
    assert padded.append(torch.ones(3, 1, dtype=torch.bool), True)[1] is not None
