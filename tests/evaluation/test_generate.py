"""Next tokens: equal to transformers, to reading everything anew and to enumeration; a text is its prompt's alone."""

import logging
from collections import Counter

import pytest
import torch

from megatron.config.sections import DataConfig, ModelConfig, ObjectiveConfig, Vocabulary
from megatron.errors import ConfigurationError
from megatron.evaluation.generate import check_empty_prompt, check_objective, generate, infill
from megatron.evaluation.sampling import Sampling
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from tests.frequencies import chi_square
from tests.model.test_reference import theirs

SIZE, EOD = 97, 96
NEVER = -1  # no id: a text then has no end
PROMPTS = [[5, 3, 9, 60], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [20, 21], [5, 3, 9, 60]]
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
FORMS = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2},
    "own head": {"untie_embeddings_and_output_weights": True},
}


def model(size: int = SIZE, **form) -> Transformer:
    config = ModelConfig(
        **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "init_method_std": 0.3, **form}
    )
    made = Transformer(config, Vocabulary(size))
    initialise(made, config, seed=1)
    return made.eval()


def greedy_by_rereading(network: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens, by reading all tokens anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(network.logits(torch.tensor([tokens]), causal=True)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_greedy_texts_equal_those_of_transformers(form):
    network = model(**form)
    twin = theirs(network, "llama")
    found = generate(network, "ar", PROMPTS, Sampling(max_new_tokens=20), EOD)
    never = list(range(SIZE, network.vocabulary.padded_size))  # theirs has a logit for [MASK] and the rows behind it
    settings = {"do_sample": False, "max_new_tokens": 20, "suppress_tokens": never, "eos_token_id": EOD}
    for prompt, text in zip(PROMPTS, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = twin.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)
        expected = expected[0, len(prompt) :].tolist()
        assert text == (expected[: expected.index(EOD)] if EOD in expected else expected)
        assert len(set(text)) > 3  # else any two would agree


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_greedy_texts_equal_reading_anew(form):
    network = model(**form)
    found = generate(network, "dual", PROMPTS, Sampling(max_new_tokens=15), eod=NEVER, batch_size=3)
    assert found == [greedy_by_rereading(network, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_text_does_not_depend_on_its_batch(objective):
    network = model()
    found = generate(network, objective, PROMPTS, DRAWN, EOD)
    assert found[0] != found[4]  # equal prompts, other draws
    for size in (1, 2):
        assert generate(network, objective, PROMPTS, DRAWN, EOD, batch_size=size) == found
    assert generate(network, objective, PROMPTS[::-1][1:], DRAWN, EOD) == [*found[1:4][::-1], found[0]]
    for prompt, text in zip(PROMPTS[:4], found):
        assert generate(network, objective, [prompt], DRAWN, EOD) == [text]
    other = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    assert generate(network, objective, PROMPTS, other, EOD) != found


def test_a_longer_text_begins_as_a_shorter_one():
    network = model()
    long = generate(network, "ar", PROMPTS, DRAWN, EOD)
    short = generate(network, "ar", PROMPTS, Sampling(max_new_tokens=5, temperature=1.0, seed=3), EOD)
    assert short == [text[:5] for text in long]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_text_ends_before_the_end_of_its_document(objective):
    network = model()
    whole = generate(network, objective, PROMPTS, DRAWN, eod=NEVER)
    end = whole[2][4]  # let a token that comes up be the end
    told = []
    found = generate(network, objective, PROMPTS, DRAWN, eod=end, advance=told.append)
    assert found == [text[: text.index(end)] if end in text else text for text in whole]
    assert len(found[2]) <= 4 and sum(told) == len(PROMPTS) * 12


def test_a_text_ends_where_it_is_enough():
    network, told = model(), []
    whole = generate(network, "ar", PROMPTS, DRAWN, eod=NEVER)
    end = whole[2][4]
    settings = {"eod": NEVER, "advance": told.append, "finished": lambda tokens: tokens[-1] == end}
    found = generate(network, "ar", PROMPTS, DRAWN, **settings)
    assert found == [text[: text.index(end) + 1] if end in text else text for text in whole]
    assert sum(told) == len(PROMPTS) * 12


def test_finished_rows_are_read_no_more(monkeypatch):
    network, read = model(), []
    whole = generate(network, "ar", PROMPTS, DRAWN, eod=NEVER)
    ends = [text.index(whole[2][4]) if whole[2][4] in text else 99 for text in whole]
    plain = network.read
    monkeypatch.setattr(network, "read", lambda tokens, *rest: read.append(len(tokens)) or plain(tokens, *rest))
    generate(network, "ar", PROMPTS, DRAWN, eod=whole[2][4])
    assert read == [sum(end >= turn for end in ends) for turn in range(12)] and min(read) < len(PROMPTS)


def test_draws_follow_the_model():
    """All texts of two tokens, and those that end before, as often as the product of their probabilities says."""
    network, count, end = model(5), 3000, 4
    found = Counter(map(tuple, generate(network, "ar", [[1, 2]] * count, replaced(2), eod=end, batch_size=count)))
    expected = {}
    with torch.no_grad():
        first = network.logits(torch.tensor([[1, 2]]), causal=True)[0, -1].double().softmax(-1)
        for token in range(5):
            second = network.logits(torch.tensor([[1, 2, token]]), causal=True)[0, -1].double().softmax(-1)
            for last in range(5):
                text = () if token == end else (token,) if last == end else (token, last)
                expected[text] = expected.get(text, 0) + float(first[token] * second[last])
    assert chi_square(found, expected, count) > 1e-3


def replaced(tokens: int, **settings) -> Sampling:
    return Sampling(**{"max_new_tokens": tokens, "temperature": 1.0, "seed": 11, **settings})


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_what_is_no_token_never_comes_out(objective):
    network = model()
    with torch.no_grad():
        network.embed_tokens.weight[SIZE:] *= 50  # [MASK] and the rows behind it would win every draw
    for sampling in (replaced(16), replaced(16, temperature=0.0)):
        found = generate(network, objective, PROMPTS, sampling, EOD)
        assert all(0 <= token < SIZE for text in found for token in text)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_an_empty_prompt_is_the_start_of_a_document(objective):
    network = model()
    empty, told = (generate(network, objective, [prompt], DRAWN, EOD) for prompt in ([], [EOD]))
    assert empty == told


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_long_prompt_loses_its_beginning(objective, caplog):
    network = model()
    with caplog.at_level(logging.INFO):
        found = generate(network, objective, [PROMPTS[2], [7]], DRAWN, EOD, seq_length=16)
    assert "1 of 2 prompts lose their beginning: with 12 new tokens, 4 fit into the 16" in caplog.text
    assert found == generate(network, objective, [PROMPTS[2][-4:], [7]], DRAWN, EOD)
    with pytest.raises(ConfigurationError, match="^--max-new-tokens 12: leaves no room for a prompt in the 12 tokens"):
        generate(network, objective, [[7]], DRAWN, EOD, seq_length=12)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_no_prompts_are_no_texts(objective):
    assert generate(model(), objective, [], DRAWN, EOD) == []


def test_what_cannot_generate_is_refused():
    network = model()
    for name, settings, said in (
        ("any-order", {}, "--objective any-order: such a model is told the place of each token"),
        ("block-diffusion", {}, "--objective block-diffusion: such a model reads a text twice"),
        ("ar", {"steps": 4}, "--steps 4: acts in masked diffusion, and --objective ar generates one token after"),
        ("dual", {"block_length": 4}, "--block-length 4: acts in masked diffusion, and --objective dual"),
        ("ar", {"order": "random"}, "--order random: acts in masked diffusion"),
        ("ar", {"remask": 0.1}, "--remask 0.1: acts in masked diffusion"),
        ("mdm", {"steps": 13}, "--steps 13: is more than --max-new-tokens 12"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            generate(network, name, PROMPTS, replaced(12, **settings), EOD)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="^--target-positions: such a model is told the place"):
        check_objective("ar", ObjectiveConfig(target_positions=True))
    with pytest.raises(ConfigurationError, match="^--objective ar: such a model knows what comes next"):
        infill(network, "ar", [[1, SIZE, 2]], DRAWN, EOD)
    with pytest.raises(ConfigurationError, match="^--objective dual: such a model says at a position what stands at"):
        infill(network, "dual", [[1, SIZE, 2]], DRAWN, EOD)


@pytest.mark.parametrize("rule", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_documents_that_never_follow_one_another_cannot_begin_empty(rule):
    data = DataConfig(train_data_path=("text",), **{rule: True})
    with pytest.raises(ConfigurationError, match=f"^--{rule.replace('_', '-')}: this model has never read on"):
        check_empty_prompt(data)
    check_empty_prompt(DataConfig(train_data_path=("text",)))
