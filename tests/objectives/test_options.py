"""Each option against a short implementation of its definition."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.batch import Batch
from megatron.config.sections import DataConfig, ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.attention import Attention, AttentionContext
from megatron.model.initialise import initialise
from megatron.model.rotary import rotary_table
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, document_rules

VOCABULARY, SEQ_LENGTH, EOD = Vocabulary(30), 12, 7
NOISE = EvaluationNoise(1, "v", 0)


def ids(count=4, seed=0, length=SEQ_LENGTH, vocabulary=VOCABULARY):
    return np.random.default_rng(seed).integers(0, vocabulary.size, (count, length + 1))


def objective(name="ar", documents=None, time_block=8, vocabulary=VOCABULARY, **options):
    return build_objective(ObjectiveConfig(objective=name, **options), vocabulary, time_block, documents)


def with_noise(batch: Batch, sample_indices, num_layers=3, **options) -> list[Batch]:
    return build_input_noise(ObjectiveConfig(**options), VOCABULARY, num_layers)(batch, sample_indices, seed=1)


def build(vocabulary=VOCABULARY, **options) -> Transformer:
    config = ModelConfig(**{"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2} | options)
    model = Transformer(config, vocabulary)
    initialise(model, config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is far from uniform
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


def nll(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch, per_position=True)


def log_p(model, tokens, causal, position_ids=None) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.logits(torch.as_tensor(tokens)[None], causal, position_ids)[0].double(), -1)


# orders and targets of next-token prediction


def test_an_order_list_is_left_to_right_and_others_and_each_sequence_takes_one():
    text = np.arange(SEQ_LENGTH + 1)[None].repeat(400, 0)
    batch = objective(num_order_list=5).prepare(text, np.arange(400), seed=1)
    assert torch.equal(batch.position_ids, batch.tokens)  # tokens are their own positions
    orders = {tuple(row.tolist()) for row in torch.cat((batch.tokens, batch.targets[:, -1:]), 1)}
    assert len(orders) == 5 and tuple(range(SEQ_LENGTH + 1)) in orders
    assert all(sorted(order) == list(range(SEQ_LENGTH + 1)) and order[0] == 0 for order in orders)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(objective(num_order_list=5).prepare(text[:3], np.arange(3), seed=1).tokens, batch.tokens[:3])
    other_seed = objective(num_order_list=5).prepare(text, np.arange(400), seed=2)
    assert {tuple(row.tolist()) for row in other_seed.tokens} != {tuple(row.tolist()) for row in batch.tokens}


def test_later_predefined_orders_are_further_from_left_to_right():
    from megatron.objectives.orders import _order_list

    length = 400
    orders = _order_list(9, True, length, seed=3)
    distances = np.abs(orders - np.arange(length)).mean(axis=1)
    assert distances[0] == 0 and 0 < distances[1] < distances[4] < distances[8] < 20
    assert np.abs(_order_list(2, False, length, seed=3)[1] - np.arange(length)).mean() > length / 5


def test_right_to_left_is_the_text_backwards_with_its_position_ids():
    text = ids(200)
    batch = objective(right_to_left_ratio=0.5).prepare(text, np.arange(200), seed=1)
    backward = batch.position_ids[:, 0] == SEQ_LENGTH
    assert 70 < int(backward.sum()) < 130
    assert np.array_equal(batch.tokens[backward].numpy(), text[backward.numpy(), :0:-1])
    assert np.array_equal(batch.targets[backward].numpy(), text[backward.numpy(), -2::-1])
    assert np.array_equal(batch.tokens[~backward].numpy(), text[~backward.numpy(), :-1])
    model, row = build(), int(backward.nonzero()[0])
    expected = log_p(model, text[row, :0:-1].copy(), True, torch.arange(SEQ_LENGTH, 0, -1)[None])
    torch.testing.assert_close(nll(model, batch)[row], -expected[range(SEQ_LENGTH), text[row, -2::-1].copy()].float())


def test_an_offset_predicts_further_ahead_and_every_sequence_weighs_the_same():
    text = ids(300)
    batch = objective(target_offset_max=5, target_positions=True).prepare(text, np.arange(300), seed=1)
    offsets = (batch.target_positions - torch.arange(SEQ_LENGTH))[:, 0]
    assert sorted(set(offsets.tolist())) == [1, 2, 3, 4, 5]
    assert torch.bincount(offsets)[1:].min() > 35
    for row, offset in enumerate(offsets.tolist()):
        scored = SEQ_LENGTH + 1 - offset
        assert np.array_equal(batch.targets[row, :scored].numpy(), text[row, offset:])
        assert not batch.weights[row, scored:].any()
        assert torch.allclose(batch.weights[row, :scored], torch.tensor(SEQ_LENGTH / scored))
    assert batch.count == 300 * SEQ_LENGTH


def test_target_positions_rotate_the_queries_to_the_target():
    config = ModelConfig(num_layers=1, hidden_size=12, num_attention_heads=2, init_method_std=0.5)
    attention = Attention(config)
    initialise(attention, config, seed=1)
    hidden = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))
    position_ids, targets = torch.tensor([[0, 3, 1, 4, 2]]), torch.tensor([[3, 1, 4, 2, 5]])
    context = AttentionContext(rotary_table(targets, 6, 10000.0), rotary_table(position_ids, 6, 10000.0), True)
    output = attention.attend(hidden, context)
    heads = [getattr(attention, f"{name}_proj")(hidden)[0].unflatten(-1, (2, 6)) for name in "qkv"]
    query, key = (torch.complex(head[..., :3], head[..., 3:]) for head in heads[:2])  # rotate-half pairs
    angles = 1 / 10000.0 ** (torch.arange(0, 6, 2) / 6)
    expected = torch.zeros(5, 2, 6)
    for i in range(5):
        scores = torch.stack(
            [
                (query[i] * key[j].conj() * torch.exp(1j * (targets[0, i] - position_ids[0, j]) * angles)).real.sum(-1)
                for j in range(i + 1)
            ]
        )
        probabilities = (scores / 6**0.5).softmax(0)
        expected[i] = (probabilities[..., None] * heads[2][: i + 1]).sum(0)
    torch.testing.assert_close(output[0], expected.flatten(1))


@pytest.mark.parametrize("alignment, last", [("common", 3), ("published", 4)])
def test_any_order_estimates_the_mean_over_orders_and_is_exact_from_left_to_right(alignment, last):
    vocabulary = Vocabulary(5)
    model, text = build(vocabulary), ids(1, 3, 4, vocabulary)
    any_order = objective("any-order", vocabulary=vocabulary)

    def chain_rule_nll(order) -> float:
        """Return the nll of the tokens one by one in `order`, each from a separate forward pass."""
        total = 0.0
        for step in range(1, len(order)):
            position_ids = torch.tensor([order[:step]])
            batch = Batch.unscored(torch.from_numpy(text[0, order[:step]][None]), True, position_ids)
            batch = replace(batch, target_positions=torch.tensor([order[1 : step + 1]]))
            logits = F.linear(model.hidden_states(batch), model.lm_weight()[: vocabulary.size])[0, -1]
            total -= float(torch.log_softmax(logits.double(), -1)[text[0, order[step]]])
        return total

    with torch.no_grad():
        bound = np.mean([chain_rule_nll((0, *order)) for order in permutations(range(1, last + 1))])
        exact = chain_rule_nll(tuple(range(last + 1)))
    assert [likelihood.exact for likelihood in any_order.likelihoods] == [False, True]
    draws = []
    for replicate in range(40):
        noise, windows = EvaluationNoise(1, "v", replicate), np.arange(16)
        batch = any_order.evaluation(text.repeat(16, 0), noise, windows, alignment)
        assert batch.count == 16 * last
        draws.append(float((nll(model, batch) * batch.weights).sum()) / 16)
    assert abs(np.mean(draws) - bound) < 4 * np.std(draws) / np.sqrt(len(draws)) and np.std(draws) > 0
    batch = any_order.likelihoods[1].evaluation(text, NOISE, np.arange(1), alignment)
    assert float((nll(model, batch) * batch.weights).sum()) == pytest.approx(exact, rel=1e-5)


# masked diffusion


def test_ar_ratio_masks_as_many_tokens_at_the_end_and_none_where_none_were_masked():
    text, indices = ids(400), np.arange(400)
    plain = objective("mdm", time_block=512).prepare(text, indices, seed=1)
    batch = objective("mdm", time_block=512, ar_ratio=0.5).prepare(text, indices, seed=1)
    before, after = plain.tokens == VOCABULARY.mask_id, batch.tokens == VOCABULARY.mask_id
    assert torch.equal(before.sum(1), after.sum(1)) and bool((before.sum(1) == 0).any())
    moved = (before != after).any(1)
    suffix = torch.arange(SEQ_LENGTH) >= SEQ_LENGTH - before.sum(1, keepdim=True)
    assert torch.equal(after[moved], suffix[moved]) and 130 < int(moved.sum()) < 220
    assert torch.equal(batch.weights > 0, after)
    assert torch.equal(batch.weights.amax(1), plain.weights.amax(1))  # 1 / p, as published
    evaluated = objective("mdm", ar_ratio=1.0).evaluation(text, NOISE, indices, "common")
    assert torch.equal(evaluated.tokens, objective("mdm").evaluation(text, NOISE, indices, "common").tokens)


def test_a_low_noise_start_scales_the_times_of_the_first_samples():
    for times in ("stratified", "iid"):
        plain = objective("mdm", mask_times=times)
        low = objective("mdm", mask_times=times, low_noise_samples=50, low_noise_ratio=0.25)
        for index in range(100):
            scale = 0.25 if index < 50 else 1.0
            assert low.time(index, 3) == scale * plain.time(index, 3)


def test_shifted_diffusion_predicts_a_masked_token_one_position_before_it():
    vocabulary = Vocabulary(5)
    model, text = build(vocabulary), ids(1, 3, 4, vocabulary)
    shifted = objective("dual", vocabulary=vocabulary).likelihoods[1]
    order_nll = []
    for order in permutations(range(1, 4)):  # unmasked one by one
        total = 0.0
        for step in range(3):
            tokens = text[0, :-1].copy()
            tokens[list(order[step:])] = vocabulary.mask_id
            total -= float(log_p(model, tokens, causal=False)[order[step] - 1, text[0, order[step]]])
        order_nll.append(total)
    draws = []
    for replicate in range(40):
        noise = EvaluationNoise(1, "v", replicate)
        batch = shifted.evaluation(text.repeat(16, 0), noise, np.arange(16), "common")
        draws.append(float((nll(model, batch) * batch.weights).sum()) / 16)
    assert abs(np.mean(draws) - np.mean(order_nll)) < 4 * np.std(draws) / np.sqrt(len(draws))
    text = ids(64, vocabulary=vocabulary)
    batch = shifted.prepare(text, np.arange(64), seed=1)
    masked = batch.tokens == vocabulary.mask_id
    assert not masked[:, 0].any() and torch.equal(batch.weights[:, :-1] > 0, masked[:, 1:])
    assert np.array_equal(batch.targets.numpy(), text[:, 1:]) and batch.count == 64 * (SEQ_LENGTH - 1)


def test_a_dual_micro_batch_has_one_objective_and_a_step_the_configured_share_of_each():
    dual = objective("dual", causal_ratio=0.25, time_block=8)
    causal = [dual.prepare(ids(2), np.array([start, start + 1]), seed=1).causal for start in range(0, 32, 2)]
    assert causal == 4 * [True, False, False, False]
    with pytest.raises(ValueError, match="belong to both objectives"):
        dual.prepare(ids(4), np.arange(4), seed=1)
    assert [likelihood.name for likelihood in dual.likelihoods] == ["ar", "mdm"]


@pytest.mark.parametrize("block_size", [1, 3, 5, SEQ_LENGTH, 100])
def test_one_pass_of_block_diffusion_equals_a_pass_for_each_block(block_size):
    model, text = build(), ids(2)
    tested = objective("block-diffusion", diffusion_block_size=block_size)
    for batch in (tested.prepare(text, np.arange(2), 1), tested.evaluation(text, NOISE, np.arange(2), "common")):
        batch_nll = nll(model, batch)
        assert not batch_nll[:, SEQ_LENGTH:].any()
        block = torch.arange(SEQ_LENGTH) // block_size
        for row in range(2):
            for index in range(int(block[-1]) + 1):
                inside = block == index
                tokens = torch.from_numpy(text[row, :-1]).where(~inside, batch.tokens[row, :SEQ_LENGTH])
                visible = (block[None] <= block[:, None]) & (block <= index)
                blocked = ~visible[None] & ~torch.eye(SEQ_LENGTH, dtype=torch.bool)
                one_block = replace(Batch.unscored(tokens[None], False), blocked=blocked)
                with torch.no_grad():
                    logits = F.linear(model.hidden_states(one_block), model.lm_weight()[: VOCABULARY.size])[0]
                scored = inside & (batch.weights[row, :SEQ_LENGTH] > 0)
                expected = F.cross_entropy(logits[scored], torch.from_numpy(text[row, :-1])[scored], reduction="none")
                torch.testing.assert_close(batch_nll[row, :SEQ_LENGTH][scored], expected, rtol=1e-4, atol=1e-5)


def test_block_diffusion_masks_each_block_at_its_own_time():
    text = ids(2000)
    batch = objective("block-diffusion", diffusion_block_size=4).prepare(text, np.arange(2000), seed=1)
    weights = batch.weights[:, :SEQ_LENGTH].unflatten(1, (3, 4))
    assert abs(float(weights.mean()) - 1) < 0.05  # E[mask / p] = 1
    mask_prob = 1 / weights.amax(-1)
    assert len(np.unique(mask_prob[0].numpy())) == 3 and batch.count == 2000 * SEQ_LENGTH
    evaluated = objective("block-diffusion", diffusion_block_size=4).evaluation(text, NOISE, np.arange(2000), "common")
    num_masked = (evaluated.weights[:, :SEQ_LENGTH] > 0).unflatten(1, (3, 4)).sum(-1)
    assert torch.allclose(evaluated.weights.sum(1), torch.tensor(SEQ_LENGTH - 1.0))
    for block, counts in enumerate(((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4))):
        assert sorted(set(num_masked[:, block].tolist())) == list(counts)


# noise on inputs


def test_row_masking_masks_keys_of_the_selected_queries():
    length, count = 64, 200
    text = ids(count, length=length)
    (batch,) = with_noise(objective().prepare(text, np.arange(count), 1), np.arange(count), randmask_ratio=0.3)
    blocked_share = batch.blocked.float().mean(-1)  # of the keys, per query
    assert not batch.blocked[:, range(length), range(length)].any()
    selected = blocked_share > 0
    assert abs(float(selected.float().mean()) - 0.3 * 0.985) < 0.02  # a small probability may block no key
    assert abs(float(blocked_share[selected].mean()) - 0.5) < 0.02
    assert abs(float(blocked_share[selected].std()) - 12**-0.5) < 0.02
    model = build()
    with torch.no_grad():
        blocked = batch.blocked[:2] | torch.ones(length, length, dtype=torch.bool).triu(1)
        plain = objective().prepare(text[:2], np.arange(2), 1)
        expected = model.hidden_states(replace(plain, blocked=blocked, causal=False))
        short = batch.map_tensors(lambda tensor: tensor[:2])
        torch.testing.assert_close(model.hidden_states(short), expected)


def test_random_replacement_draws_from_the_whole_vocabulary_and_keeps_the_targets():
    text, indices = ids(4000), np.arange(4000)
    plain = objective().prepare(text, indices, 1)
    (batch,) = with_noise(plain, indices, random_replacement=0.2)
    changed = batch.tokens != plain.tokens
    assert abs(float(changed.float().mean()) - 0.2 * (1 - 1 / VOCABULARY.size)) < 0.01
    counts = torch.bincount(batch.tokens[changed], minlength=VOCABULARY.size)
    assert len(counts) == VOCABULARY.size and counts.min() > 0.7 * counts.max()
    assert torch.equal(batch.targets, plain.targets) and torch.equal(batch.weights, plain.weights)


def test_masked_input_adds_a_second_loss_on_masked_inputs():
    text, indices, model = ids(64), np.arange(64), build()
    plain = objective().prepare(text, indices, 1)
    first, second = with_noise(plain, indices, masked_input_weight=0.4, masked_input_max=0.8)
    assert first is plain
    masked = second.tokens == VOCABULARY.mask_id
    assert torch.equal(second.tokens[~masked], plain.tokens[~masked]) and 0.3 < float(masked.float().mean()) < 0.5
    with torch.no_grad():
        loss = float(model(first) + model(second)) / (first.count + second.count)
    expected = 0.0
    for row in range(64):
        for tokens, weight in ((plain.tokens[row], 1.0), (second.tokens[row], 0.4)):
            expected -= weight * float(log_p(model, tokens, True)[range(SEQ_LENGTH), text[row, 1:]].mean()) / 64
    assert loss == pytest.approx(expected, rel=1e-5)


def test_stochastic_depth_skips_deeper_blocks_more_often_and_keeps_the_expectation():
    indices = np.arange(20000)
    (batch,) = with_noise(objective().prepare(ids(20000), indices, 1), indices, stochastic_depth=0.6)
    for block, keep_prob in enumerate((0.8, 0.6, 0.4)):
        scales = batch.residual_scales[:, block]
        assert set(scales.unique().tolist()) == {0.0, np.float32(1 / keep_prob).item()}
        assert abs(float(scales.mean()) - 1) < 0.04
    model = build()
    plain = objective().prepare(ids(3), np.arange(3), 1)
    scales = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    scaled_nll = nll(model, replace(plain, residual_scales=scales))
    torch.testing.assert_close(scaled_nll[0], nll(model, plain)[0])
    for row, skipped in ((1, ["1"]), (2, ["0", "1", "2"])):
        shallow = build()
        shallow.schedule = [(position, name) for position, name in shallow.schedule if name not in skipped]
        torch.testing.assert_close(scaled_nll[row], nll(shallow, plain)[row])


# documents


def packed():
    """Return one sample of two documents, which end at 4 and 9, and the start of a third: ids [1, S+1]."""
    text = ids(1)
    text[text == EOD] = EOD + 1
    text[0, [4, 9]] = EOD
    return text


def rules(**flags):
    return document_rules(DataConfig(**flags), ObjectiveConfig(), EOD)


@pytest.mark.parametrize("name, offset", [("ar", 1), ("mdm", 0), ("block-diffusion", 0)])
def test_documents_with_reset_attention_are_scored_as_if_alone(name, offset):
    model, text = build(), packed()
    tested = objective(name, rules(reset_attention_mask=True, reset_position_ids=True))
    batch = tested.prepare(text, np.arange(1), 1)
    batch_nll = nll(model, batch)
    token_index = torch.arange(batch.tokens.shape[1]) % SEQ_LENGTH
    for start, stop in ((0, 5), (5, 10), (10, SEQ_LENGTH)):
        inside = (token_index >= start) & (token_index < stop)

        def crop(tensor, inside=inside):
            return tensor[:, inside][..., inside] if tensor.dim() == 3 else tensor[:, inside[: tensor.shape[1]]]

        alone = replace(batch, scored_positions=torch.empty(1, 0, dtype=torch.int64), documents=None)
        alone = replace(alone.map_tensors(crop), scored_positions=None)
        torch.testing.assert_close(batch_nll[:, inside], nll(model, alone), rtol=1e-4, atol=1e-5)
        assert batch.position_ids[0, inside][0] == 0


def test_without_rules_attention_crosses_document_boundaries():
    model, text = build(), packed()
    changed = text.copy()
    changed[0, 0] += 1
    for documents, crosses in ((rules(reset_attention_mask=True), False), (None, True)):
        tested = objective("ar", documents)
        later_nll = [nll(model, tested.prepare(sample, np.arange(1), 1))[0, 6:] for sample in (text, changed)]
        assert torch.equal(*later_nll) != crosses


@pytest.mark.parametrize("name", ["ar", "mdm", "dual", "block-diffusion"])
@pytest.mark.parametrize("alignment", ["common", "published"])
def test_the_first_token_of_a_document_may_be_left_out(name, alignment):
    text, masked_loss, plain = packed(), objective(name, rules(eod_mask_loss=True)), objective(name)
    for with_rules, without in zip(masked_loss.likelihoods, plain.likelihoods):
        assert (without.scored(text, alignment) & ~with_rules.scored(text, alignment)).nonzero()[1].tolist() == [5, 10]
        for window in range(8):
            batch = with_rules.evaluation(text, NOISE, np.array([window]), alignment)
            plain_batch = without.evaluation(text, NOISE, np.array([window]), alignment)
            excluded = (plain_batch.weights - batch.weights).nonzero()[:, 1] + with_rules.target_offset
            assert set(excluded.tolist()) <= {5, 10} and batch.count == plain_batch.count - 2
            assert batch.count == with_rules.scored(text, alignment).sum()


@pytest.mark.parametrize(
    "options",
    [{"num_order_list": 4}, {"right_to_left_ratio": 0.5}, {"objective": "any-order"}, {"target_offset_max": 3}],
)
def test_documents_need_text_that_is_read_from_left_to_right(options):
    options |= {"target_positions": True} if "target_offset_max" in options else {}
    with pytest.raises(ConfigurationError, match="--reset-position-ids: .*leave one of them out"):
        document_rules(DataConfig(reset_position_ids=True), ObjectiveConfig(**options), EOD)


# properties of every objective

VARIANTS = {
    "dual": {"objective": "dual"},
    "any-order": {"objective": "any-order"},
    "blocks": {"objective": "block-diffusion", "diffusion_block_size": 5},
    "orders": {"num_order_list": 4, "target_positions": True},
    "backwards": {"right_to_left_ratio": 0.5},
    "offsets": {"target_offset_max": 4, "target_positions": True},
    "suffix": {"objective": "mdm", "ar_ratio": 0.5, "low_noise_samples": 4},
    "bell": {"objective": "mdm", "mask_time_distribution": "bell", "low_noise_samples": 102},
    "blocks of a window": {
        **{"objective": "block-diffusion", "diffusion_block_size": 5, "mask_time_distribution": "window"},
        **{"mask_time_weighting": "none", "mdm_loss": "simple"},
    },
    "noise": {"token_dropout_max": 0.5, "random_replacement": 0.3, "randmask_ratio": 0.5, "stochastic_depth": 0.5},
    "second pass": {"masked_input_weight": 0.4},
}
DOCUMENTS = document_rules(
    DataConfig(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True), ObjectiveConfig(), EOD
)


def build_variant(options: dict, documents=None, time_block: int = 8):
    return build_objective(ObjectiveConfig(**options), VOCABULARY, time_block, documents)


def batches(options: dict, text: np.ndarray, indices: np.ndarray, seed: int = 1) -> list[Batch]:
    noise = build_input_noise(ObjectiveConfig(**options), VOCABULARY, num_layers=3)
    return noise(build_variant(options).prepare(text, indices, seed), indices, seed)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}


def same(first: Batch, second: Batch) -> bool:
    left, right = tensors_of(first), tensors_of(second)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_noise_depends_on_sample_index_and_seed_only(name):
    text = ids(8)
    for start in (96, 100):  # causal, masked with the dual objective
        whole = batches(VARIANTS[name], text[:4], np.arange(start, start + 4))
        for row in (2, 0, 3):
            alone = batches(VARIANTS[name], text[[row]], np.array([start + row]))
            for batch, single in zip(whole, alone, strict=True):
                expected = batch.map_tensors(lambda tensor, row=row: tensor[[row]] if len(tensor) == 4 else tensor)
                assert same(replace(expected, scored_positions=None), single)
                assert batch.counts[row] == single.counts[0]
    text = text[:1].repeat(4, 0)
    first = batches(VARIANTS[name], text, np.arange(100, 104))
    assert all(map(same, first, batches(VARIANTS[name], text, np.arange(100, 104))))
    assert not all(map(same, first, batches(VARIANTS[name], text, np.arange(100, 104), seed=2)))
    assert not all(map(same, first, batches(VARIANTS[name], text, np.arange(200, 204))))  # the next epoch


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_has_its_scored_positions_and_does_not_change_its_text(name):
    text, indices = ids(4), np.arange(100, 104)
    text.flags.writeable = indices.flags.writeable = False
    likelihoods = build_variant(VARIANTS[name]).likelihoods
    evaluated = [likelihood.evaluation(text, NOISE, indices, "common") for likelihood in likelihoods]
    for batch in (*batches(VARIANTS[name], text, indices), *evaluated):
        assert torch.equal(batch.scored_positions, batch.weights.flatten().nonzero().flatten())
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.weights.dtype == torch.float32
        assert batch.tokens.shape == batch.targets.shape == batch.weights.shape and batch.tokens.is_contiguous()
        assert not np.shares_memory(text, batch.tokens.numpy()) and not np.shares_memory(text, batch.targets.numpy())
        assert int(batch.tokens.max()) <= VOCABULARY.mask_id and int(batch.targets.max()) < VOCABULARY.size


@pytest.mark.parametrize("alignment", ["common", "published"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["stream", "documents"])
@pytest.mark.parametrize("name", ["dual", "any-order", "blocks", "suffix"])
def test_a_uniform_model_scores_log_v_for_any_draw(name, documents, alignment):
    if name == "any-order" and documents:
        return  # refused
    text = packed().repeat(6, 0) if documents else ids(6)
    for likelihood in build_variant(VARIANTS[name], documents).likelihoods:
        batch = likelihood.evaluation(text, NOISE, np.arange(6), alignment)
        scored = likelihood.scored(text, alignment)
        assert np.array_equal(batch.counts, scored.sum(axis=1))
        has_weight = batch.weights > 0
        sequences = has_weight.nonzero()[:, 0].numpy()
        targets = likelihood.target_token_positions(batch)[has_weight.numpy()]
        assert scored[sequences, targets].all()  # only scored tokens have weight
        assert np.array_equal(batch.targets[has_weight].numpy(), text[sequences, targets])
        if not documents:
            assert torch.allclose(batch.weights.sum(1), torch.from_numpy(batch.counts).float(), rtol=1e-5)


TRAINING_ONLY = ["backwards", "suffix", "bell", "noise", "second pass"]


@pytest.mark.parametrize("name", TRAINING_ONLY)
def test_what_training_adds_does_not_act_in_evaluation(name):
    text, plain = ids(6), {"objective": VARIANTS[name].get("objective", "ar")}
    batch, expected = (
        build_variant(options).evaluation(text, NOISE, np.arange(6), "common") for options in (VARIANTS[name], plain)
    )
    assert same(batch, expected)


def test_orders_and_offsets_do_not_act_in_evaluation_but_target_positions_do():
    text = ids(6)
    expected = build_variant({"target_positions": True}).evaluation(text, NOISE, np.arange(6), "common")
    for options in (VARIANTS["orders"], VARIANTS["offsets"]):
        batch = build_variant(options).evaluation(text, NOISE, np.arange(6), "common")
        assert same(batch, expected)
    assert torch.equal(batch.target_positions[0], torch.arange(1, SEQ_LENGTH + 1))
