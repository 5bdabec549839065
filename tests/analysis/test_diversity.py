import numpy as np
import pytest
import torch

from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.diversity import FACTS, measure_diversity
from cognica_poe.analysis.probes import PROBES
from tests.analysis.helpers import BOS, ByteTokenizer, bpb, make_texts
from tests.conftest import make_model

TOKENIZER, TEXTS = ByteTokenizer(), make_texts(6)


def small_model(**changes):
    return make_model(max_position_embeddings=128, **changes)


def edited(gauge: str, stage: int | None, beta: float, **changes):
    """The model with its weights changed as a variant says."""
    model = small_model(**changes)
    with torch.no_grad():
        weights = [head.weight for head in model.lm_head_stages]
        mean = torch.stack(list(weights)).mean(0) if gauge == "centred" else torch.zeros_like(weights[0])
        for k, weight in enumerate(weights):
            if stage in (None, k):
                weight.copy_(mean + beta * (weight - mean))
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_variants_equal_an_edited_model(alpha):
    model = small_model(poe_alpha=alpha)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_diversity(model, TOKENIZER, TEXTS, np.arange(6), betas=(0.0, 2.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(v.gauge, v.stage, v.beta) for v in found.perturbations] == [
        (gauge, *variant) for gauge in ("stored", "centred")
        for variant in ((0, 0.0), (1, 0.0), (2, 0.0), (None, 0.0), (None, 1.0), (None, 2.0))
    ]  # fmt: skip
    base = bpb(measure_paths(model, TOKENIZER, TEXTS).sums, "full")
    for variant in found.perturbations:
        other = edited(variant.gauge, variant.stage, variant.beta, poe_alpha=alpha)
        expected = bpb(measure_paths(other, TOKENIZER, TEXTS).sums, "full")
        assert variant.bpb == pytest.approx(expected) and variant.value == pytest.approx(expected - base, abs=1e-9)
        assert variant.low <= variant.value <= variant.high
        if variant.beta == 1.0:
            assert variant.value == variant.low == variant.high == 0.0
    assert (found.tokens, found.units) == (sum(map(len, TEXTS)), 6)


def test_recall_is_the_probability_of_the_answer():
    model = small_model()
    found = measure_diversity(model, TOKENIZER, TEXTS, np.arange(6), betas=(0.0, 2.0)).recall
    assert len(found) == len(FACTS) * 6
    for recall in found:
        prompt, answer = next(fact for fact in FACTS if fact[0] == recall.prompt)
        assert answer.strip() == recall.answer
        ids = [BOS, *TOKENIZER.encode(prompt)]
        other, chance, rank = edited(recall.gauge, None, recall.beta), 1.0, None
        for token in TOKENIZER.encode(answer):
            with torch.no_grad():
                scores = other.forward_aggregated(torch.tensor([ids]))[0, -1]
            rank = rank or int((scores > scores[token]).sum()) + 1
            chance *= float(scores[token].exp())
            ids.append(token)
        assert recall.probability == pytest.approx(chance, rel=1e-6) and recall.rank == rank


def test_facts_are_those_of_the_probes():
    for prompt, answer in FACTS:
        probe = next(probe for probe in PROBES if probe.prompt == prompt)
        assert probe.expected.startswith(answer.strip())


def test_documents_keep_their_part_of_the_sample():
    found = measure_diversity(small_model(), TOKENIZER, ["ab" * 40, "cd" * 10], np.arange(2), betas=(), tokens=50)
    assert found.tokens == 40 + 10


@pytest.mark.parametrize("changes", [{"per_stage_head": False}, {"poe_mode": "none"}, {"poe_stage_layers": [5]}])
def test_one_head_has_no_diversity(changes):
    assert measure_diversity(small_model(**changes), TOKENIZER, TEXTS, np.arange(6)) is None
    assert measure_diversity(small_model(), TOKENIZER, TEXTS, np.zeros(6, dtype=int)) is None
