"""Each option's mathematics against a few lines that are written from its definition."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.batch import Batch
from megatron.config.sections import DataConfig, ModelConfig, ObjectiveConfig, Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.attention import Attention, AttentionContext
from megatron.model.initialise import initialise
from megatron.model.rotary import rotary_table
from megatron.model.transformer import Transformer
from megatron.objectives import build_input_noise, build_objective, document_rules
from megatron.objectives.base import EvaluationNoise

VOCABULARY, SEQ_LENGTH, EOD = Vocabulary(30), 12, 7
NOISE = EvaluationNoise(1, "v", 0)


def ids(count=4, seed=0, length=SEQ_LENGTH, vocabulary=VOCABULARY):
    return np.random.default_rng(seed).integers(0, vocabulary.size, (count, length + 1))


def objective(name="ar", documents=None, time_block=8, vocabulary=VOCABULARY, **options):
    return build_objective(ObjectiveConfig(objective=name, **options), vocabulary, time_block, documents)


def corrupted(batch: Batch, positions, num_layers=3, **options) -> list[Batch]:
    return build_input_noise(ObjectiveConfig(**options), VOCABULARY, num_layers)(batch, positions, seed=1)


def network(vocabulary=VOCABULARY, **options) -> Transformer:
    config = ModelConfig(**{"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2} | options)
    model = Transformer(config, vocabulary)
    initialise(model, config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention does not see all alike
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


def nll(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch, per_position=True)


def log_p(model, tokens, causal, positions=None) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.logits(torch.as_tensor(tokens)[None], causal, positions)[0].double(), -1)


# orders of reading


def test_an_order_list_is_left_to_right_and_others_and_each_sequence_takes_one():
    made, text = objective(num_order_list=5), np.arange(SEQ_LENGTH + 1)[None].repeat(400, 0)
    batch = made.prepare(text, np.arange(400), seed=1)
    assert torch.equal(batch.position_ids, batch.tokens)  # the text says the place of each token
    read = {tuple(row.tolist()) for row in torch.cat((batch.tokens, batch.targets[:, -1:]), 1)}
    assert len(read) == 5 and tuple(range(SEQ_LENGTH + 1)) in read
    assert all(sorted(order) == list(range(SEQ_LENGTH + 1)) and order[0] == 0 for order in read)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(objective(num_order_list=5).prepare(text[:3], np.arange(3), seed=1).tokens, batch.tokens[:3])
    other = objective(num_order_list=5).prepare(text, np.arange(400), seed=2)
    assert {tuple(row.tolist()) for row in other.tokens} != {tuple(row.tolist()) for row in batch.tokens}


def test_predefined_orders_stray_further_the_later_they_stand_in_the_list():
    from megatron.objectives.orders import _listed

    length = 400
    orders = _listed(9, True, length, seed=3)
    strays = np.abs(orders - np.arange(length)).mean(axis=1)
    assert strays[0] == 0 and 0 < strays[1] < strays[4] < strays[8] < 20
    assert np.abs(_listed(2, False, length, seed=3)[1] - np.arange(length)).mean() > length / 5


def test_right_to_left_is_the_text_backwards_at_its_own_places():
    text = ids(200)
    batch = objective(right_to_left_ratio=0.5).prepare(text, np.arange(200), seed=1)
    back = batch.position_ids[:, 0] == SEQ_LENGTH
    assert 70 < int(back.sum()) < 130
    assert np.array_equal(batch.tokens[back].numpy(), text[back.numpy(), :0:-1])
    assert np.array_equal(batch.targets[back].numpy(), text[back.numpy(), -2::-1])
    assert np.array_equal(batch.tokens[~back].numpy(), text[~back.numpy(), :-1])
    model, row = network(), int(back.nonzero()[0])
    expected = log_p(model, text[row, :0:-1].copy(), True, torch.arange(SEQ_LENGTH, 0, -1)[None])
    found = nll(model, batch)[row]
    torch.testing.assert_close(found, -expected[range(SEQ_LENGTH), text[row, -2::-1].copy()].float())


def test_an_offset_asks_further_ahead_and_every_sequence_weighs_the_same():
    text = ids(300)
    batch = objective(target_offset_max=5, target_positions=True).prepare(text, np.arange(300), seed=1)
    offsets = (batch.target_positions - torch.arange(SEQ_LENGTH))[:, 0]
    assert sorted(set(offsets.tolist())) == [1, 2, 3, 4, 5]
    assert torch.bincount(offsets)[1:].min() > 35
    for row, offset in enumerate(offsets.tolist()):
        asked = SEQ_LENGTH + 1 - offset
        assert np.array_equal(batch.targets[row, :asked].numpy(), text[row, offset:])
        assert not batch.weights[row, asked:].any()
        assert torch.allclose(batch.weights[row, :asked], torch.tensor(SEQ_LENGTH / asked))
    assert batch.count == 300 * SEQ_LENGTH


def test_a_told_target_turns_the_queries_to_its_place():
    config = ModelConfig(num_layers=1, hidden_size=12, num_attention_heads=2, init_method_std=0.5)
    attention = Attention(config)
    initialise(attention, config, seed=1)
    hidden = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))
    places, targets = torch.tensor([[0, 3, 1, 4, 2]]), torch.tensor([[3, 1, 4, 2, 5]])
    sight = AttentionContext(rotary_table(targets, 6, 10000.0), rotary_table(places, 6, 10000.0), True)
    found = attention(hidden, sight)
    heads = [getattr(attention, f"{name}_proj")(hidden)[0].unflatten(-1, (2, 6)) for name in "qkv"]
    query, key = (torch.complex(part[..., :3], part[..., 3:]) for part in heads[:2])  # rotate-half pairs
    angles = 1 / 10000.0 ** (torch.arange(0, 6, 2) / 6)
    mixed = torch.zeros(5, 2, 6)
    for i in range(5):
        scores = torch.stack(
            [
                (query[i] * key[j].conj() * torch.exp(1j * (targets[0, i] - places[0, j]) * angles)).real.sum(-1)
                for j in range(i + 1)
            ]
        )
        shares = (scores / 6**0.5).softmax(0)
        mixed[i] = (shares[..., None] * heads[2][: i + 1]).sum(0)
    torch.testing.assert_close(found[0], mixed.flatten(1))


@pytest.mark.parametrize("alignment, last", [("common", 3), ("published", 4)])
def test_any_order_estimates_the_mean_over_orders_and_is_exact_from_left_to_right(alignment, last):
    vocabulary = Vocabulary(5)
    model, text = network(vocabulary), ids(1, 3, 4, vocabulary)
    made = objective("any-order", vocabulary=vocabulary)

    def chain(order) -> float:
        """Return the nll of token by token in one order, by the plain model, told each place by hand."""
        total = 0.0
        for turn in range(1, len(order)):
            read = torch.tensor([order[:turn]])
            batch = Batch.unscored(torch.from_numpy(text[0, order[:turn]][None]), True, read)
            batch = replace(batch, target_positions=torch.tensor([order[1 : turn + 1]]))
            logits = F.linear(model.hidden_states(batch), model.lm_weight()[: vocabulary.size])[0, -1]
            total -= float(torch.log_softmax(logits.double(), -1)[text[0, order[turn]]])
        return total

    with torch.no_grad():
        bound = np.mean([chain((0, *order)) for order in permutations(range(1, last + 1))])
        exact = chain(tuple(range(last + 1)))
    assert [each.exact for each in made.likelihoods] == [False, True]
    draws = []
    for replicate in range(40):
        noise, windows = EvaluationNoise(1, "v", replicate), np.arange(16)
        batch = made.evaluation(text.repeat(16, 0), noise, windows, alignment)
        assert batch.count == 16 * last
        draws.append(float((nll(model, batch) * batch.weights).sum()) / 16)
    assert abs(np.mean(draws) - bound) < 4 * np.std(draws) / np.sqrt(len(draws)) and np.std(draws) > 0
    batch = made.likelihoods[1].evaluation(text, NOISE, np.arange(1), alignment)
    assert float((nll(model, batch) * batch.weights).sum()) == pytest.approx(exact, rel=1e-5)


# masked diffusion


def test_ar_ratio_hides_as_many_tokens_at_the_end_and_none_where_none_were_hidden():
    text, positions = ids(400), np.arange(400)
    plain = objective("mdm", time_block=512).prepare(text, positions, seed=1)
    found = objective("mdm", time_block=512, ar_ratio=0.5).prepare(text, positions, seed=1)
    before, after = plain.tokens == VOCABULARY.mask_id, found.tokens == VOCABULARY.mask_id
    assert torch.equal(before.sum(1), after.sum(1)) and bool((before.sum(1) == 0).any())
    moved = (before != after).any(1)
    suffix = torch.arange(SEQ_LENGTH) >= SEQ_LENGTH - before.sum(1, keepdim=True)
    assert torch.equal(after[moved], suffix[moved]) and 130 < int(moved.sum()) < 220
    assert torch.equal(found.weights > 0, after)
    assert torch.equal(found.weights.amax(1), plain.weights.amax(1))  # 1 / p, as published
    evaluated = [
        made.evaluation(text, NOISE, positions, "common") for made in (objective("mdm"), objective("mdm", ar_ratio=1.0))
    ]
    assert torch.equal(evaluated[0].tokens, evaluated[1].tokens)


def test_a_low_noise_start_scales_the_times_of_the_first_samples():
    for times in ("stratified", "iid"):
        plain = objective("mdm", mask_times=times)
        low = objective("mdm", mask_times=times, low_noise_samples=50, low_noise_ratio=0.25)
        for position in range(100):
            scale = 0.25 if position < 50 else 1.0
            assert low.time(position, 3) == scale * plain.time(position, 3)


def test_shifted_diffusion_says_a_hidden_token_one_position_before_it():
    vocabulary = Vocabulary(5)
    model, text = network(vocabulary), ids(1, 3, 4, vocabulary)
    made = objective("dual", vocabulary=vocabulary).likelihoods[1]
    orders = []
    for order in permutations(range(1, 4)):  # revealed one by one
        total = 0.0
        for turn in range(3):
            tokens = text[0, :-1].copy()
            tokens[list(order[turn:])] = vocabulary.mask_id
            total -= float(log_p(model, tokens, causal=False)[order[turn] - 1, text[0, order[turn]]])
        orders.append(total)
    draws = []
    for replicate in range(40):
        noise = EvaluationNoise(1, "v", replicate)
        batch = made.evaluation(text.repeat(16, 0), noise, np.arange(16), "common")
        draws.append(float((nll(model, batch) * batch.weights).sum()) / 16)
    assert abs(np.mean(draws) - np.mean(orders)) < 4 * np.std(draws) / np.sqrt(len(draws))
    text = ids(64, vocabulary=vocabulary)
    batch = made.prepare(text, np.arange(64), seed=1)
    hidden = batch.tokens == vocabulary.mask_id
    assert not hidden[:, 0].any() and torch.equal(batch.weights[:, :-1] > 0, hidden[:, 1:])
    assert np.array_equal(batch.targets.numpy(), text[:, 1:]) and batch.count == 64 * (SEQ_LENGTH - 1)


def test_a_dual_micro_batch_is_of_one_kind_and_a_step_has_the_asked_share_of_each():
    made = objective("dual", causal_ratio=0.25, time_block=8)
    kinds = [made.prepare(ids(2), np.array([start, start + 1]), seed=1).causal for start in range(0, 32, 2)]
    assert kinds == 4 * [True, False, False, False]
    with pytest.raises(ValueError, match="both kinds"):
        made.prepare(ids(4), np.arange(4), seed=1)
    assert [each.name for each in made.likelihoods] == ["ar", "mdm"]


@pytest.mark.parametrize("block_size", [1, 3, 5, SEQ_LENGTH, 100])
def test_one_pass_of_block_diffusion_equals_a_pass_for_each_block(block_size):
    model, text = network(), ids(2)
    made = objective("block-diffusion", diffusion_block_size=block_size)
    for batch in (made.prepare(text, np.arange(2), 1), made.evaluation(text, NOISE, np.arange(2), "common")):
        found = nll(model, batch)
        assert not found[:, SEQ_LENGTH:].any()
        block = torch.arange(SEQ_LENGTH) // block_size
        for row in range(2):
            for index in range(int(block[-1]) + 1):
                inside = block == index
                tokens = torch.from_numpy(text[row, :-1]).where(~inside, batch.tokens[row, :SEQ_LENGTH])
                visible = (block[None] <= block[:, None]) & (block <= index)
                reading = Batch.unscored(tokens[None], False)
                blocked = ~visible[None] & ~torch.eye(SEQ_LENGTH, dtype=torch.bool)
                reading = replace(reading, blocked=blocked)
                with torch.no_grad():
                    logits = F.linear(model.hidden_states(reading), model.lm_weight()[: VOCABULARY.size])[0]
                scored = inside & (batch.weights[row, :SEQ_LENGTH] > 0)
                expected = F.cross_entropy(logits[scored], torch.from_numpy(text[row, :-1])[scored], reduction="none")
                torch.testing.assert_close(found[row, :SEQ_LENGTH][scored], expected, rtol=1e-4, atol=1e-5)


def test_block_diffusion_hides_each_block_at_a_time_of_its_own():
    text = ids(2000)
    batch = objective("block-diffusion", diffusion_block_size=4).prepare(text, np.arange(2000), seed=1)
    weights = batch.weights[:, :SEQ_LENGTH].unflatten(1, (3, 4))
    assert abs(float(weights.mean()) - 1) < 0.05  # E[mask / p] = 1
    shares = 1 / weights.amax(-1)
    assert len(np.unique(shares[0].numpy())) == 3 and batch.count == 2000 * SEQ_LENGTH
    evaluated = objective("block-diffusion", diffusion_block_size=4).evaluation(text, NOISE, np.arange(2000), "common")
    hidden = (evaluated.weights[:, :SEQ_LENGTH] > 0).unflatten(1, (3, 4)).sum(-1)
    assert torch.allclose(evaluated.weights.sum(1), torch.tensor(SEQ_LENGTH - 1.0))
    for block, sizes in enumerate(((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4))):
        assert sorted(set(hidden[:, block].tolist())) == list(sizes)


# noise on inputs


def test_row_masking_thins_what_the_chosen_positions_see():
    length, count = 64, 200
    text = ids(count, length=length)
    (batch,) = corrupted(objective().prepare(text, np.arange(count), 1), np.arange(count), randmask_ratio=0.3)
    shares = batch.blocked.float().mean(-1)  # of the keys, by row
    assert not batch.blocked[:, range(length), range(length)].any()
    chosen = shares > 0
    assert abs(float(chosen.float().mean()) - 0.3 * 0.985) < 0.02  # a small share may block nothing
    assert abs(float(shares[chosen].mean()) - 0.5) < 0.02 and abs(float(shares[chosen].std()) - 12**-0.5) < 0.02
    model = network()
    with torch.no_grad():
        blocked = batch.blocked[:2] | torch.ones(length, length, dtype=torch.bool).triu(1)
        plain = objective().prepare(text[:2], np.arange(2), 1)
        expected = model.hidden_states(replace(plain, blocked=blocked, causal=False))
        short = batch.map_tensors(lambda tensor: tensor[:2])
        torch.testing.assert_close(model.hidden_states(short), expected)


def test_random_replacement_draws_from_the_whole_vocabulary_and_keeps_the_targets():
    text, positions = ids(4000), np.arange(4000)
    plain = objective().prepare(text, positions, 1)
    (batch,) = corrupted(plain, positions, random_replacement=0.2)
    changed = batch.tokens != plain.tokens
    assert abs(float(changed.float().mean()) - 0.2 * (1 - 1 / VOCABULARY.size)) < 0.01
    counts = torch.bincount(batch.tokens[changed], minlength=VOCABULARY.size)
    assert len(counts) == VOCABULARY.size and counts.min() > 0.7 * counts.max()
    assert torch.equal(batch.targets, plain.targets) and torch.equal(batch.weights, plain.weights)


def test_masked_input_adds_a_second_loss_on_masked_inputs():
    text, positions, model = ids(64), np.arange(64), network()
    plain = objective().prepare(text, positions, 1)
    first, second = corrupted(plain, positions, masked_input_weight=0.4, masked_input_max=0.8)
    assert first is plain
    hidden = second.tokens == VOCABULARY.mask_id
    assert torch.equal(second.tokens[~hidden], plain.tokens[~hidden]) and 0.3 < float(hidden.float().mean()) < 0.5
    with torch.no_grad():
        loss = float(model(first) + model(second)) / (first.count + second.count)
    expected = 0.0
    for row in range(64):
        for tokens, weight in ((plain.tokens[row], 1.0), (second.tokens[row], 0.4)):
            expected -= weight * float(log_p(model, tokens, True)[range(SEQ_LENGTH), text[row, 1:]].mean()) / 64
    assert loss == pytest.approx(expected, rel=1e-5)


def test_stochastic_depth_skips_deeper_blocks_more_often_and_keeps_the_expectation():
    positions = np.arange(20000)
    (batch,) = corrupted(objective().prepare(ids(20000), positions, 1), positions, stochastic_depth=0.6)
    for block, kept in enumerate((0.8, 0.6, 0.4)):
        factors = batch.residual_scales[:, block]
        assert set(factors.unique().tolist()) == {0.0, np.float32(1 / kept).item()}
        assert abs(float(factors.mean()) - 1) < 0.04
    model = network()
    plain = objective().prepare(ids(3), np.arange(3), 1)
    factors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    found = nll(model, replace(plain, residual_scales=factors))
    torch.testing.assert_close(found[0], nll(model, plain)[0])
    for row, gone in ((1, ["1"]), (2, ["0", "1", "2"])):
        shallow = network()
        for name in gone:
            del shallow.layers[name]
        torch.testing.assert_close(found[row], nll(shallow, plain)[row])


# documents


def packed(first=5):
    """Return one sample of two documents and a part of a third: ids [1, S+1]."""
    text = ids(1)
    text[text == EOD] = EOD + 1
    text[0, first - 1] = text[0, 9] = EOD
    return text


def rules(**asked):
    return document_rules(DataConfig(**asked), ObjectiveConfig(), EOD)


@pytest.mark.parametrize("name, offset", [("ar", 1), ("mdm", 0), ("block-diffusion", 0)])
def test_documents_that_do_not_see_one_another_are_scored_as_if_alone(name, offset):
    model, text = network(), packed()
    made = objective(name, rules(reset_attention_mask=True, reset_position_ids=True))
    batch = made.prepare(text, np.arange(1), 1)
    found, places = nll(model, batch), torch.arange(batch.tokens.shape[1]) % SEQ_LENGTH
    for start, stop in ((0, 5), (5, 10), (10, SEQ_LENGTH)):
        inside = (places >= start) & (places < stop)
        alone = replace(batch, scored_positions=torch.empty(1, 0, dtype=torch.int64), documents=None)
        alone = alone.map_tensors(lambda t: t[:, inside][..., inside] if t.dim() == 3 else t[:, inside[: t.shape[1]]])
        alone = replace(alone, scored_positions=None)
        torch.testing.assert_close(found[:, inside], nll(model, alone), rtol=1e-4, atol=1e-5)
        assert batch.position_ids[0, inside][0] == 0


def test_without_rules_documents_see_one_another():
    model, text = network(), packed()
    changed = text.copy()
    changed[0, 0] += 1
    for documents, moved in ((rules(reset_attention_mask=True), False), (None, True)):
        made = objective("ar", documents)
        pair = [nll(model, made.prepare(each, np.arange(1), 1))[0, 6:] for each in (text, changed)]
        assert torch.equal(*pair) != moved


@pytest.mark.parametrize("name", ["ar", "mdm", "dual", "block-diffusion"])
@pytest.mark.parametrize("alignment", ["common", "published"])
def test_the_first_token_of_a_document_may_be_left_out(name, alignment):
    text, ruled, plain = packed(), objective(name, rules(eod_mask_loss=True)), objective(name)
    for with_rules, without in zip(ruled.likelihoods, plain.likelihoods):
        assert (without.scored(text, alignment) & ~with_rules.scored(text, alignment)).nonzero()[1].tolist() == [5, 10]
        for window in range(8):
            batches = [each.evaluation(text, NOISE, np.array([window]), alignment) for each in (with_rules, without)]
            left_out = batches[1].weights - batches[0].weights
            places = left_out.nonzero()[:, 1] + with_rules.target_offset
            assert set(places.tolist()) <= {5, 10} and batches[0].count == batches[1].count - 2
            assert batches[0].count == with_rules.scored(text, alignment).sum()


@pytest.mark.parametrize(
    "options",
    [{"num_order_list": 4}, {"right_to_left_ratio": 0.5}, {"objective": "any-order"}, {"target_offset_max": 3}],
)
def test_documents_need_text_that_is_read_from_left_to_right(options):
    options |= {"target_positions": True} if "target_offset_max" in options else {}
    with pytest.raises(ConfigurationError, match="--reset-position-ids: .*leave one of them out"):
        document_rules(DataConfig(reset_position_ids=True), ObjectiveConfig(**options), EOD)


# what every objective keeps

EVERY = {
    "dual": {"objective": "dual"},
    "any-order": {"objective": "any-order"},
    "blocks": {"objective": "block-diffusion", "diffusion_block_size": 5},
    "orders": {"num_order_list": 4, "target_positions": True},
    "backwards": {"right_to_left_ratio": 0.5},
    "offsets": {"target_offset_max": 4, "target_positions": True},
    "suffix": {"objective": "mdm", "ar_ratio": 0.5, "low_noise_samples": 4},
    "noise": {"token_dropout_max": 0.5, "random_replacement": 0.3, "randmask_ratio": 0.5, "stochastic_depth": 0.5},
    "second pass": {"masked_input_weight": 0.4},
}
DOCUMENTS = document_rules(
    DataConfig(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True), ObjectiveConfig(), EOD
)


def made(options: dict, documents=None, time_block: int = 8):
    return build_objective(ObjectiveConfig(**options), VOCABULARY, time_block, documents)


def batches(options: dict, text: np.ndarray, positions: np.ndarray, seed: int = 1) -> list[Batch]:
    noise = build_input_noise(ObjectiveConfig(**options), VOCABULARY, num_layers=3)
    return noise(made(options).prepare(text, positions, seed), positions, seed)


def same(one: Batch, two: Batch) -> bool:
    tensors = ({name: value for name, value in vars(each).items() if torch.is_tensor(value)} for each in (one, two))
    first, second = tensors
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", EVERY)
def test_noise_is_of_the_run_position_and_the_seed_alone(name):
    text = ids(8)
    for start in (96, 100):  # of either kind, under the dual objective
        whole = batches(EVERY[name], text[:4], np.arange(start, start + 4))
        for row in (2, 0, 3):
            alone = batches(EVERY[name], text[[row]], np.array([start + row]))
            for batch, part in zip(whole, alone, strict=True):
                expected = batch.map_tensors(lambda tensor: tensor[[row]] if len(tensor) == 4 else tensor)
                assert same(replace(expected, scored_positions=None), part) and batch.counts[row] == part.counts[0]
    text = text[:1].repeat(4, 0)
    again = batches(EVERY[name], text, np.arange(100, 104))
    assert all(map(same, again, batches(EVERY[name], text, np.arange(100, 104))))
    assert not all(map(same, again, batches(EVERY[name], text, np.arange(100, 104), seed=2)))
    assert not all(map(same, again, batches(EVERY[name], text, np.arange(200, 204))))  # the next epoch


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_names_its_scored_rows_and_leaves_its_text_alone(name):
    text, positions = ids(4), np.arange(100, 104)
    text.flags.writeable = positions.flags.writeable = False
    evaluated = [each.evaluation(text, NOISE, positions, "common") for each in made(EVERY[name]).likelihoods]
    for batch in (*batches(EVERY[name], text, positions), *evaluated):
        assert torch.equal(batch.scored_positions, batch.weights.flatten().nonzero().flatten())
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.weights.dtype == torch.float32
        assert batch.tokens.shape == batch.targets.shape == batch.weights.shape and batch.tokens.is_contiguous()
        assert not np.shares_memory(text, batch.tokens.numpy()) and not np.shares_memory(text, batch.targets.numpy())
        assert int(batch.tokens.max()) <= VOCABULARY.mask_id and int(batch.targets.max()) < VOCABULARY.size


@pytest.mark.parametrize("alignment", ["common", "published"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["stream", "documents"])
@pytest.mark.parametrize("name", ["dual", "any-order", "blocks", "suffix"])
def test_a_uniform_model_scores_log_v_whatever_the_draw(name, documents, alignment):
    if name == "any-order" and documents:
        return  # is refused
    text = packed().repeat(6, 0) if documents else ids(6)
    for likelihood in made(EVERY[name], documents).likelihoods:
        batch = likelihood.evaluation(text, NOISE, np.arange(6), alignment)
        scored = likelihood.scored(text, alignment)
        assert np.array_equal(batch.counts, scored.sum(axis=1))
        asked = batch.weights > 0
        rows, places = asked.nonzero()[:, 0].numpy(), likelihood.target_token_positions(batch)[asked.numpy()]
        assert scored[rows, places].all()  # nothing is asked that is not scored
        assert np.array_equal(batch.targets[asked].numpy(), text[rows, places])
        if not documents:
            assert torch.allclose(batch.weights.sum(1), torch.from_numpy(batch.counts).float(), rtol=1e-5)


TRAINING_ONLY = ["backwards", "suffix", "noise", "second pass"]


@pytest.mark.parametrize("name", TRAINING_ONLY)
def test_what_training_adds_does_not_act_in_evaluation(name):
    text, plain = ids(6), {"objective": EVERY[name].get("objective", "ar")}
    found, expected = (
        made(options).evaluation(text, NOISE, np.arange(6), "common") for options in (EVERY[name], plain)
    )
    assert same(found, expected)


def test_orders_and_offsets_do_not_act_in_evaluation_but_targets_stay_told():
    text, told = ids(6), {"target_positions": True}
    for options in (EVERY["orders"], EVERY["offsets"]):
        found, expected = (made(each).evaluation(text, NOISE, np.arange(6), "common") for each in (options, told))
        assert same(found, expected)
    assert torch.equal(found.target_positions[0], torch.arange(1, SEQ_LENGTH + 1))
