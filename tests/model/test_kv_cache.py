"""Reading in pieces, in rows of several lengths and from a shared prefix gives what reading at once gives."""

import pytest
import torch

from megatron.config.sections import ModelConfig, Vocabulary
from megatron.model.initialise import initialise
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer

VOCABULARY = Vocabulary(61)
FORMS = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2},
    "normed queries": {"qk_layernorm": True, "untie_embeddings_and_output_weights": True},
}


def model(**form):
    config = ModelConfig(**{"num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, **form})
    made = Transformer(config, VOCABULARY)
    initialise(made, config, seed=1)
    return made.eval()


def draw(*shape):
    return torch.randint(VOCABULARY.size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("pieces", [(12,), (1,) * 12, (5, 1, 4, 2)], ids=str)
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(form, pieces):
    network, tokens, past, found = model(**form), draw(2, 12), KVCache(), []
    for piece in tokens.split(pieces, dim=1):
        found.append(network.head(network.read(piece, past)))
    torch.testing.assert_close(torch.cat(found, 1), network.logits(tokens, causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_rows_of_several_lengths_stand_beside_one_another(left):
    network, tokens, lengths, past = model(), draw(3, 9), (9, 2, 5), KVCache()
    rows, present = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    spans = [slice(9 - length, 9) if left else slice(length) for length in lengths]
    for row, (span, length) in enumerate(zip(spans, lengths)):
        rows[row, span], present[row, span] = tokens[row, :length], True
    read = network.head(network.read(rows, past, present))
    more = network.head(network.read(tokens[:, :2], past))
    for row, (span, length) in enumerate(zip(spans, lengths)):
        whole = network.logits(torch.cat((tokens[row, :length], tokens[row, :2]))[None], causal=True)[0]
        torch.testing.assert_close(read[row, span], whole[:length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(more[row], whole[length:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_shared_by_its_answers():
    network, prefixes, answers, past = model(), draw(2, 6), draw(5, 3), KVCache()
    network.read(prefixes, past)
    owners = torch.tensor([0, 1, 1, 0, 1])
    found = network.head(network.read(answers, past.select(owners)))
    whole = network.logits(torch.cat((prefixes[owners], answers), 1), causal=True)[:, 6:]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert past.present.shape == (2, 6), "answers must not be added to the prefix itself"
