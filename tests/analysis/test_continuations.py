import numpy as np
import pytest
import torch

from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.continuations import Path, Scorer
from cognica_poe.errors import UserError
from tests.analysis.helpers import BOS, ByteTokenizer, make_texts
from tests.conftest import make_model

TOKENIZER = ByteTokenizer()
PATHS = {Path(): "full", Path("prefix", 2): "prefix1", Path("stage", 2): "stage2", Path("stage", 0): "stage0"}


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_whole_texts_are_what_bits_per_byte_measures(path):
    model, texts = make_model(max_position_embeddings=24), make_texts(7, longest=90)
    found = Scorer(model, BOS, path).rolling([TOKENIZER.encode(text) for text in texts])
    sums = measure_paths(model, TOKENIZER, texts).sums
    np.testing.assert_allclose([-value for value in found], sums.nats[PATHS[path]], rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_continuations_begin_with_bos_whatever_is_cut(path):
    model = make_model(max_position_embeddings=24)
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(0, 96, size=n).tolist(), generator.integers(0, 96, size=m).tolist())
             for n, m in ((0, 3), (5, 1), (21, 3), (30, 4), (0, 24), (9, 24))]  # fmt: skip
    scorer = Scorer(model, BOS, path)
    for (context, continuation), found in zip(pairs, scorer.continuations(pairs), strict=True):
        row = [BOS, *context[max(0, len(context) + len(continuation) - 24) :]]
        total, greedy = 0.0, True
        for token in continuation:
            with torch.no_grad():
                score = scorer.logprobs(torch.tensor([row]))[0, -1]
            total, greedy = total + float(score[token]), greedy and int(score.argmax()) == token
            row.append(token)
        assert found.logprob == pytest.approx(total, rel=1e-9) and found.greedy == greedy
        assert len(row) - 1 <= 24


def test_the_most_probable_continuation_is_greedy():
    model = make_model(max_position_embeddings=24)
    out = model.generate_prefix(torch.tensor([[BOS, 5, 6]]), max_new_tokens=4, eos_token_id=[])[0].tolist()
    right, wrong = Scorer(model, BOS).continuations([([5, 6], out[3:]), ([5, 6], [*out[3:6], (out[6] + 1) % 96])])
    assert right.greedy and not wrong.greedy


def test_paths_that_do_not_exist_are_refused():
    model = make_model()
    for path in (Path("prefix", 4), Path("prefix", 0), Path("stage", 3)):
        with pytest.raises(UserError, match="has 3 stages"):
            Scorer(model, BOS, path)
    plain = make_model(poe_mode="none")
    with pytest.raises(UserError, match="full alone"):
        Scorer(plain, BOS, Path("stage", 0))
    found = Scorer(plain, BOS).rolling([TOKENIZER.encode("abc")])[0]
    assert -found == pytest.approx(measure_paths(plain, TOKENIZER, ["abc", "d"]).sums.nats["plain"][0])
    with pytest.raises(UserError, match="300 tokens cannot be scored"):
        Scorer(model, BOS).continuations([([], [1] * 300)])
