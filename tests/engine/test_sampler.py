"""The sampler against transformers' logits processors, the OpenAI penalty formula and torch's log_softmax."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import cast

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import logits as ops
from server.engine.messages import SamplingParams
from server.engine.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 1000


def random_logits(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def warped(logits: Tensor, params: SamplingParams, seen: Sequence[int] = ()) -> Tensor:
    """Probabilities [n, vocab] as transformers' generate computes them; presence and frequency are not among them."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([list(seen)] * len(logits), dtype=torch.int64)
    result: Tensor = processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits.clone()))
    return result.double().softmax(dim=-1)


def kept_probabilities(logits: Tensor, params: SamplingParams, width: int) -> tuple[Tensor, Tensor]:
    """What keep_likeliest leaves, as probabilities [n, vocab], and which rows `width` did not decide."""

    def column(value: float) -> Tensor:
        return torch.full((len(logits), 1), float(value))

    filters = ops.Filters(
        column(params.top_k),
        column(params.top_p),
        column(math.log(params.min_p) if params.min_p else -math.inf),
        max_top_k=params.top_k,
        has_free_top_p=params.top_k == 0,
    )
    weights, ids, is_short = ops.keep_likeliest(logits, column(params.temperature), filters, width)
    full = weights if ids is None else torch.zeros_like(logits).scatter_(1, ids, weights)
    return full.double() / full.double().sum(dim=-1, keepdim=True), is_short


def admitted(params: Sequence[SamplingParams], vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(len(params), vocab, CPU)
    for row, p in enumerate(params):
        sampler.admit(row, p, [1, 2, 3], [])
    return sampler


FILTERS = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=40, temperature=0.7),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999, temperature=1.7),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_k=50, top_p=0.8),
    SamplingParams(top_p=0.95, min_p=0.05),
    SamplingParams(top_k=30, top_p=0.9, min_p=0.2, temperature=1.3),
]


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_keep_what_transformers_keeps(params: SamplingParams, spread: float) -> None:
    logits = random_logits(32, spread=spread)
    expected = warped(logits, params)
    actual, is_short = kept_probabilities(logits, params, VOCAB)
    assert not is_short.any()
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


@given(
    data=st.data(),
    top_k=st.sampled_from([0, 1, 3, 9]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    temperature=st.floats(0.05, 5.0),
)
@settings(max_examples=150, deadline=None)
def test_a_decided_row_does_not_depend_on_how_many_tokens_were_looked_at(
    data: st.DataObject, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    """Few distinct values: ties at every border."""
    values = data.draw(st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 3.0]), min_size=40, max_size=40))
    logits = torch.tensor([values])
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    full, _ = kept_probabilities(logits, params, 40)
    for width in (10, 20, 30):
        narrow, is_short = kept_probabilities(logits, params, width)
        if not is_short[0]:
            torch.testing.assert_close(narrow, full, rtol=1e-12, atol=0)
    kept = {value for value, probability in zip(values, full[0].tolist(), strict=True) if probability > 0}
    for value, probability in zip(values, full[0].tolist(), strict=True):
        assert (probability > 0) == (value in kept), "tokens that tie are kept or dropped together"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=7, temperature=1.5),
        SamplingParams(top_p=0.7),
        SamplingParams(top_k=20, top_p=0.9, min_p=0.03),
        SamplingParams(repetition_penalty=1.8, top_k=20),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 6000 fixed draws, one a row; the rows differ in the seed alone."""
    logits = random_logits(1, vocab=40, spread=1.5, seed=4)
    num_rows, history = 6000, [1, 5, 6]
    sampler = Sampler(num_rows, 40, CPU)
    for row in range(num_rows):
        sampler.admit(row, msgspec.structs.replace(params, seed=row), history, [])
    tokens = sampler.sample(logits.expand(num_rows, -1), range(num_rows), [3] * num_rows).tokens
    counts = torch.bincount(tokens, minlength=40)
    expected = warped(logits, params, history)[0] * num_rows
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    chi_square = float(((counts - expected)[is_possible] ** 2 / expected[is_possible]).sum())
    freedom = int(is_possible.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = random_logits(16, spread=2).bfloat16()
    sampler = admitted([SamplingParams(temperature=0, seed=1)] * 16)
    assert torch.equal(sampler.sample(logits, range(16), [0] * 16).tokens, logits.argmax(-1))
    logits = torch.zeros(16, VOCAB)
    logits[:, [300, 17, 999]] = 1.0
    assert sampler.sample(logits, range(16), [0] * 16).tokens.tolist() == [17] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(dtype: torch.dtype, spread: float) -> None:
    """Every kind of settings side by side, some with penalties, greedy or log-probabilities, for several steps."""
    kinds = [
        SamplingParams(temperature=0, seed=1),
        SamplingParams(temperature=0, repetition_penalty=1.3, seed=1),
        SamplingParams(seed=5, frequency_penalty=0.5, presence_penalty=0.2, top_p=0.9),
        SamplingParams(seed=6, min_p=0.1),
        SamplingParams(seed=7, logprobs=3),
        SamplingParams(seed=8, top_k=5000),
        SamplingParams(seed=9, top_k=300, top_p=0.5),
        *(msgspec.structs.replace(p, seed=40 + i) for i, p in enumerate(FILTERS)),
    ]
    vocab, num_steps = 5000, 6
    logits = [random_logits(len(kinds), vocab, spread, seed=step).to(dtype) for step in range(num_steps)]
    batch = admitted(kinds, vocab)
    order = list(range(len(kinds)))
    together: list[list[int]] = [[] for _ in kinds]
    for step in range(num_steps):
        order = order[3:] + order[:3]  # places in the batch change, rows do not
        tokens = batch.sample(logits[step][order], order, [step] * len(order)).tokens.tolist()
        for row, token in zip(order, tokens, strict=True):
            together[row].append(token)
    assert batch.last_tokens[:-1].tolist() == [tokens[-1] for tokens in together]
    for i, params in enumerate(kinds):
        alone = admitted([params], vocab)
        tokens = [int(alone.sample(logits[step][i : i + 1], [0], [step]).tokens) for step in range(num_steps)]
        assert tokens == together[i], params


def test_seeds_and_steps_give_different_draws() -> None:
    logits = torch.zeros(1, VOCAB)
    sampler = Sampler(2, VOCAB, CPU)
    drawn = set()
    for seed in range(10):
        sampler.admit(0, SamplingParams(seed=seed), [1], [])
        drawn |= {int(sampler.sample(logits, [0], [step]).tokens) for step in range(10)}
    assert len(drawn) > 80


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, output = [3, 4, 4, 9], [7, 3]
    logits = random_logits(1)
    sampler = Sampler(4, VOCAB, CPU)
    sampler.admit(2, SamplingParams(temperature=0, repetition_penalty=1.7, seed=0), prompt, output)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    seen[0, prompt + output] = True
    assert torch.equal(ops.penalise_repetition(logits, seen, torch.tensor([[1.7]])), expected)
    boosted = logits.clone()
    boosted[0, [3, 4, 7, 9]] = logits.max() + torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), boosted.clone())
    assert int(sampler.sample(boosted, [2], [2]).tokens) == int(expected.argmax())
    assert int(expected.argmax()) != int(boosted.argmax())


def openai_penalised(logits: list[float], output: Sequence[int], frequency: float, presence: float) -> list[float]:
    """The formula of OpenAI's API reference: mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence."""
    counts = Counter(output)
    return [x - counts[j] * frequency - (counts[j] > 0) * presence for j, x in enumerate(logits)]


def test_frequency_and_presence_penalties_follow_the_output_as_it_grows() -> None:
    """Greedy decoding of constant logits walks as the formula does; the prompt does not count."""
    logits = random_logits(1, vocab=12, spread=0.5)
    for frequency, presence in [(0.4, 0.0), (0.0, 0.7), (0.3, 0.2), (-0.5, -0.1)]:
        sampler = Sampler(1, 12, CPU)
        params = SamplingParams(temperature=0, frequency_penalty=frequency, presence_penalty=presence, seed=0)
        sampler.admit(0, params, list(range(12)), [])
        output: list[int] = []
        for step in range(30):
            scores = openai_penalised(logits[0].tolist(), output, frequency, presence)
            expected = max(range(12), key=scores.__getitem__)
            output.append(int(sampler.sample(logits, [0], [step]).tokens))
            assert output[-1] == expected


def test_admission_after_preemption_restores_the_state() -> None:
    params = SamplingParams(seed=3, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, top_p=0.95)
    logits = [random_logits(1, seed=step) for step in range(12)]
    whole = Sampler(2, VOCAB, CPU)
    whole.admit(0, params, [5, 6], [])
    expected = [int(whole.sample(logits[step], [0], [step]).tokens) for step in range(12)]
    resumed = Sampler(2, VOCAB, CPU)
    resumed.admit(1, SamplingParams(seed=9, frequency_penalty=2.0), [1, 2, 3], [4, 4, 4])  # leaves its traces
    resumed.admit(1, params, [5, 6], expected[:7])
    assert int(resumed.last_tokens[1]) == expected[6]
    assert [int(resumed.sample(logits[step], [1], [step]).tokens) for step in range(7, 12)] == expected[7:]


def test_a_row_keeps_nothing_of_the_sequence_before() -> None:
    logits = random_logits(1)
    sampler = Sampler(1, VOCAB, CPU)
    sampler.admit(0, SamplingParams(temperature=0, repetition_penalty=5.0, seed=1), [int(logits.argmax())], [])
    assert int(sampler.sample(logits, [0], [0]).tokens) != int(logits.argmax())
    sampler.admit(0, SamplingParams(temperature=0, seed=1), [1], [])
    assert int(sampler.sample(logits, [0], [0]).tokens) == int(logits.argmax())


def test_logprobs_are_log_softmax_of_the_raw_logits() -> None:
    logits = random_logits(4)
    before = logits.clone()
    kinds = [
        SamplingParams(seed=1, temperature=0.2, top_k=3, repetition_penalty=2.0, logprobs=4),
        SamplingParams(seed=2),
        SamplingParams(seed=3, temperature=0, logprobs=0),
        SamplingParams(seed=4, frequency_penalty=1.0, logprobs=2),
    ]
    batch = admitted(kinds).sample(logits, range(4), [0] * 4)
    assert torch.equal(logits, before)
    expected = logits.log_softmax(dim=-1)
    assert batch.logprobs is not None
    assert batch.top_ids is not None
    assert batch.top_logprobs is not None
    for i in (0, 2, 3):
        torch.testing.assert_close(batch.logprobs[i], expected[i, batch.tokens[i]], rtol=0, atol=1e-5)
    for i in (0, 3):
        top = expected[i].topk(4)
        assert torch.equal(batch.top_ids[i], top.indices)
        torch.testing.assert_close(batch.top_logprobs[i], top.values, rtol=0, atol=1e-5)
    assert admitted([SamplingParams(seed=1)]).sample(logits[:1], [0], [0]).logprobs is None
    only_drawn = admitted([SamplingParams(seed=1, logprobs=0)]).sample(logits[:1], [0], [0])
    assert only_drawn.logprobs is not None
    assert only_drawn.top_ids is None


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(8, spread=50)
    kinds = [SamplingParams(temperature=temperature, top_p=p, seed=i) for i, p in enumerate([1.0, 0.5] * 4)]
    tokens = admitted(kinds).sample(logits, range(8), [0] * 8).tokens
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(-1))
    assert bool((tokens < VOCAB).all())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_no_token_of_weight_zero_is_drawn(uniform: float) -> None:
    weights = torch.zeros(2, 50)
    weights[0, 20:30] = torch.rand(10, generator=torch.Generator().manual_seed(0)) * 1e-30
    weights[1, 7] = 1.0
    uniforms = torch.full((2, 1), uniform, dtype=torch.float64)
    tokens = ops.draw(weights, None, uniforms, torch.tensor([25, 7]))
    assert tokens.tolist() == [20 if uniform == 0 else 29, 7]


def test_logits_that_are_not_numbers_spoil_their_own_row_alone() -> None:
    logits = random_logits(3)
    kinds = [SamplingParams(seed=1, top_p=0.9), SamplingParams(seed=2, top_p=0.9), SamplingParams(seed=3)]
    clean = admitted(kinds).sample(logits, range(3), [0] * 3).tokens
    logits[1] = float("nan")
    tokens = admitted(kinds).sample(logits, range(3), [0] * 3).tokens
    assert tokens[[0, 2]].tolist() == clean[[0, 2]].tolist()
    assert 0 <= int(tokens[1]) < VOCAB


def test_greedy_tokens_that_are_known_are_taken() -> None:
    """Only where every row is greedy and without penalties; then they come from whoever has them, and nothing is drawn
    again."""
    logits = random_logits(2)
    known = torch.tensor([7, 8])
    greedy = SamplingParams(temperature=0.0, seed=0)
    asking = SamplingParams(temperature=0.0, seed=0, logprobs=0)
    taken = admitted([greedy, asking]).sample(logits, [0, 1], [0, 0], known)
    assert taken.tokens.tolist() == [7, 8]
    assert taken.logprobs is not None
    assert taken.logprobs[1] == pytest.approx(float(logits[1].log_softmax(-1)[8]), abs=1e-5)
    for other in (SamplingParams(temperature=0.9, seed=0), SamplingParams(temperature=0.0, seed=0, presence_penalty=1)):
        sampler = admitted([greedy, other])
        tokens = sampler.sample(logits, [0, 1], [0, 0], known).tokens
        assert tokens.equal(admitted([greedy, other]).sample(logits, [0, 1], [0, 0]).tokens)
        assert sampler.last_tokens[:2].equal(tokens)
