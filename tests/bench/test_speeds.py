from cognica_poe.analysis.probes import PROBES
from cognica_poe.analysis.record_parts import Speed
from cognica_poe.bench.speeds import measure_speeds
from tests.analysis.helpers import ByteTokenizer
from tests.conftest import make_model


def test_every_cheaper_mode_is_timed_against_plain_decoding():
    model, lines = make_model(max_position_embeddings=128).train(), []
    before = model.config
    rows = measure_speeds(
        model, ByteTokenizer(), [3.0, 1.5], {"0.99": [0.5, 0.25]}, k_draft=2, new_tokens=4, rounds=1, log=lines.append
    )
    modes = ["prefix 1", "prefix 2", "stage 0", "stage 1", "stage 2", "wand", "wand 0.99", "speculative stage 2"]
    assert [row["mode"] for row in rows] == modes
    for row in rows:
        speed = Speed.model_validate(row)
        assert 0 < speed.low <= speed.ratio <= speed.high and (speed.prompts, speed.new_tokens) == (7, 4)
    assert model.config is before and model.training and lines


def test_a_short_context_leaves_room_for_less_or_for_none():
    options = {"k_draft": 2, "new_tokens": 60, "rounds": 1}
    longest = max(len(ByteTokenizer().encode(probe.prompt)) + 1 for probe in PROBES)
    rows = measure_speeds(make_model(max_position_embeddings=longest + 3), ByteTokenizer(), [3.0, 1.5], {}, **options)
    assert {row["new_tokens"] for row in rows} == {3}
    assert measure_speeds(make_model(max_position_embeddings=longest), ByteTokenizer(), [3.0, 1.5], {}, **options) == []


def test_a_plain_path_has_nothing_to_time():
    assert measure_speeds(make_model(poe_mode="none"), ByteTokenizer(), [], {}) == []
