"""Causal generation: equal to transformers, to no KV cache and to enumeration; independent of the batch."""

import logging
from collections import Counter

import pytest
import torch

from megatron.config.sections import DataConfig, ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.generation.generate import check_empty_prompt, check_objective, generate, infill
from megatron.generation.sampling import Sampling
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from tests.frequencies import chi_square
from tests.model.test_reference import hugging_face_twin

SIZE, EOD = 97, 96
NEVER = -1  # an eod that no token equals
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
    transformer = Transformer(config, Vocabulary(size))
    initialise(transformer, config, seed=1)
    return transformer.eval()


def greedy_by_rereading(transformer: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens without a KV cache."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(transformer.logits(torch.tensor([tokens]), causal=True)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_greedy_texts_equal_those_of_transformers(form):
    transformer = model(**form)
    twin = hugging_face_twin(transformer, "llama")
    texts = generate(transformer, "ar", PROMPTS, Sampling(max_new_tokens=20), eod=EOD)
    excluded_ids = list(
        range(SIZE, transformer.vocabulary.padded_size)
    )  # transformers has logits for [MASK] and padding rows
    settings = {"do_sample": False, "max_new_tokens": 20, "suppress_tokens": excluded_ids, "eos_token_id": EOD}
    for prompt, text in zip(PROMPTS, texts, strict=True):
        tokens = torch.tensor([prompt])
        expected = twin.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)
        expected = expected[0, len(prompt) :].tolist()
        assert text == (expected[: expected.index(EOD)] if EOD in expected else expected)
        assert len(set(text)) > 3  # equality would be trivial otherwise


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_greedy_texts_equal_reading_anew(form):
    transformer = model(**form)
    texts = generate(transformer, "dual", PROMPTS, Sampling(max_new_tokens=15), eod=NEVER, batch_size=3)
    assert texts == [greedy_by_rereading(transformer, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_text_does_not_depend_on_its_batch(objective):
    transformer = model()
    texts = generate(transformer, objective, PROMPTS, DRAWN, eod=EOD)
    assert texts[0] != texts[4]  # equal prompts have different draws
    for size in (1, 2):
        assert generate(transformer, objective, PROMPTS, DRAWN, eod=EOD, batch_size=size) == texts
    assert generate(transformer, objective, PROMPTS[::-1][1:], DRAWN, eod=EOD) == [*texts[1:4][::-1], texts[0]]
    for prompt, text in zip(PROMPTS[:4], texts):
        assert generate(transformer, objective, [prompt], DRAWN, eod=EOD) == [text]
    other = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    assert generate(transformer, objective, PROMPTS, other, eod=EOD) != texts


def test_a_longer_text_begins_as_a_shorter_one():
    transformer = model()
    long = generate(transformer, "ar", PROMPTS, DRAWN, eod=EOD)
    short = generate(transformer, "ar", PROMPTS, Sampling(max_new_tokens=5, temperature=1.0, seed=3), eod=EOD)
    assert short == [text[:5] for text in long]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_text_ends_before_the_end_of_its_document(objective):
    transformer = model()
    whole = generate(transformer, objective, PROMPTS, DRAWN, eod=NEVER)
    end = whole[2][4]  # a token that was sampled becomes the eod
    advances = []
    texts = generate(transformer, objective, PROMPTS, DRAWN, eod=end, advance=advances.append)
    assert texts == [text[: text.index(end)] if end in text else text for text in whole]
    assert len(texts[2]) <= 4 and sum(advances) == len(PROMPTS) * 12


def test_a_text_ends_where_it_is_enough():
    transformer, advances = model(), []
    whole = generate(transformer, "ar", PROMPTS, DRAWN, eod=NEVER)
    end = whole[2][4]
    settings = {"eod": NEVER, "advance": advances.append, "finished": lambda tokens: tokens[-1] == end}
    texts = generate(transformer, "ar", PROMPTS, DRAWN, **settings)
    assert texts == [text[: text.index(end) + 1] if end in text else text for text in whole]
    assert sum(advances) == len(PROMPTS) * 12


def test_finished_rows_are_read_no_more(monkeypatch):
    transformer, batch_sizes = model(), []
    whole = generate(transformer, "ar", PROMPTS, DRAWN, eod=NEVER)
    ends = [text.index(whole[2][4]) if whole[2][4] in text else 99 for text in whole]
    plain = transformer.read
    monkeypatch.setattr(
        transformer, "read", lambda tokens, *arguments: batch_sizes.append(len(tokens)) or plain(tokens, *arguments)
    )
    generate(transformer, "ar", PROMPTS, DRAWN, eod=whole[2][4])
    assert batch_sizes == [sum(end >= turn for end in ends) for turn in range(12)] and min(batch_sizes) < len(PROMPTS)


def test_draws_follow_the_model():
    """Frequencies of all texts of up to two tokens equal the products of their probabilities."""
    transformer, count, end = model(5), 3000, 4
    frequencies = Counter(
        map(tuple, generate(transformer, "ar", [[1, 2]] * count, temperature_1(2), eod=end, batch_size=count))
    )
    expected = {}
    with torch.no_grad():
        first = transformer.logits(torch.tensor([[1, 2]]), causal=True)[0, -1].double().softmax(-1)
        for token in range(5):
            second = transformer.logits(torch.tensor([[1, 2, token]]), causal=True)[0, -1].double().softmax(-1)
            for last in range(5):
                text = () if token == end else (token,) if last == end else (token, last)
                expected[text] = expected.get(text, 0) + float(first[token] * second[last])
    assert chi_square(frequencies, expected, count) > 1e-3


def temperature_1(tokens: int, **settings) -> Sampling:
    return Sampling(**{"max_new_tokens": tokens, "temperature": 1.0, "seed": 11, **settings})


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_what_is_no_token_never_comes_out(objective):
    transformer = model()
    with torch.no_grad():
        transformer.embed_tokens.weight[SIZE:] *= 50  # [MASK] and padding rows would have the largest logits
    for sampling in (temperature_1(16), temperature_1(16, temperature=0.0)):
        texts = generate(transformer, objective, PROMPTS, sampling, eod=EOD)
        assert all(0 <= token < SIZE for text in texts for token in text)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_an_empty_prompt_is_the_start_of_a_document(objective):
    transformer = model()
    empty, explicit = (generate(transformer, objective, [prompt], DRAWN, eod=EOD) for prompt in ([], [EOD]))
    assert empty == explicit


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_long_prompt_loses_its_beginning(objective, caplog):
    transformer = model()
    with caplog.at_level(logging.INFO):
        texts = generate(transformer, objective, [PROMPTS[2], [7]], DRAWN, eod=EOD, seq_length=16)
    assert "1 of 2 prompts are truncated on the left: with 12 new tokens, 4 fit into the 16" in caplog.text
    assert texts == generate(transformer, objective, [PROMPTS[2][-4:], [7]], DRAWN, eod=EOD)
    with pytest.raises(ConfigurationError, match="^--max-new-tokens 12: leaves no room for a prompt in the 12 tokens"):
        generate(transformer, objective, [[7]], DRAWN, eod=EOD, seq_length=12)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_no_prompts_are_no_texts(objective):
    assert generate(model(), objective, [], DRAWN, eod=EOD) == []


def test_what_cannot_generate_is_refused():
    transformer = model()
    for name, settings, message in (
        ("any-order", {}, "--objective any-order: such a model is given the position of each target"),
        ("block-diffusion", {}, "--objective block-diffusion: such a model processes a text twice"),
        ("ar", {"steps": 4}, "--steps 4: acts in masked diffusion, and --objective ar generates one token after"),
        ("dual", {"block_length": 4}, "--block-length 4: acts in masked diffusion, and --objective dual"),
        ("ar", {"order": "random"}, "--order random: acts in masked diffusion"),
        ("ar", {"remask": 0.1}, "--remask 0.1: acts in masked diffusion"),
        ("mdm", {"steps": 13}, "--steps 13: is more than --max-new-tokens 12"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            generate(transformer, name, PROMPTS, temperature_1(12, **settings), eod=EOD)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="^--target-positions: such a model is given the position"):
        check_objective("ar", ObjectiveConfig(target_positions=True))
    with pytest.raises(
        ConfigurationError, match="^--objective ar: such a model predicts the next token from the tokens before it"
    ):
        infill(transformer, "ar", [[1, SIZE, 2]], DRAWN, eod=EOD)
    with pytest.raises(
        ConfigurationError, match="^--objective dual: such a model predicts the token of the next position"
    ):
        infill(transformer, "dual", [[1, SIZE, 2]], DRAWN, eod=EOD)


@pytest.mark.parametrize("setting", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_documents_that_never_follow_one_another_cannot_begin_empty(setting):
    data = DataConfig(train_data_path=("text",), **{setting: True})
    with pytest.raises(ConfigurationError, match=f"^--{setting.replace('_', '-')}: this model was not trained to"):
        check_empty_prompt(data)
    check_empty_prompt(DataConfig(train_data_path=("text",)))
