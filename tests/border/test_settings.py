"""Every setting acts or is refused: fields of transformers' ``GenerationConfig``, in every mode.

The tests walk over the class of the installed transformers: a field that a later version adds fails here until it is
decided, and is refused by the modes meanwhile.
"""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WatermarkingConfig,
)

from cognica_poe.modeling.decoding_cognica_poe import MODES as METHODS
from cognica_poe.modeling.sampling_cognica_poe import TokenChoice
from cognica_poe.modeling.settings_cognica_poe import ACTING, OWN, is_neutral
from tests.conftest import make_model

IDS = torch.tensor([[5, 9, 2, 9, 5, 9], [7, 7, 3, 1, 4, 2]])
MODES = {
    "full": {},
    "prefix": {"max_stages": 3},
    "stage": {"stage": 0},
    "wand": {"p99_bounds": [90.0, 90.0], "safety": 9.0},
    "speculative": {"drafter": "lookup", "k_draft": 3},
    "parallel": {"stages": [0, 1, 2]},
}
"""Each mode with options that make it the full pool; the one stage of ``ONE_STAGE`` is the full pool as well."""
ONE_STAGE = {"poe_stage_layers": [5]}

EOS = {"eos_token_id": [66, 78]}
ACTS = {
    "max_length": ({"max_length": 19}, {}),
    "max_new_tokens": ({"max_new_tokens": 7}, {}),
    "min_length": ({"min_length": 15}, EOS),
    "min_new_tokens": ({"min_new_tokens": 9}, EOS),
    "max_time": ({"max_time": 0.0}, {}),
    "stop_strings": ({"stop_strings": [chr(0x4E00 + n) for n in range(0, 90, 4)]}, {"eos_token_id": 96}),
    "eos_token_id": ({"eos_token_id": [66, 78]}, {}),
    "pad_token_id": ({"pad_token_id": 3}, EOS),
    "repetition_penalty": ({"repetition_penalty": 1.8}, {}),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 3.0}, {}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, {}),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 1}, {}),
    "bad_words_ids": ({"bad_words_ids": [[77, 95], [29]]}, {}),
    "forced_bos_token_id": ({"forced_bos_token_id": 11}, {"prompt": torch.tensor([[5], [7]])}),
    "forced_eos_token_id": ({"forced_eos_token_id": 12}, {}),
    "remove_invalid_values": ({"remove_invalid_values": True}, {}),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (2, 1.9)}, EOS),
    "suppress_tokens": ({"suppress_tokens": [77, 29]}, {}),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [77, 29, 27]}, {}),
    "sequence_bias": ({"sequence_bias": [[[77, 95], -9.0], [[5], 4.0]]}, {}),
    "bos_token_id": ({"bos_token_id": 8}, {"prompt": None}),
    "return_dict_in_generate": ({"return_dict_in_generate": True}, {}),
    "renormalize_logits": ({"renormalize_logits": True}, {}),
    "disable_compile": ({"disable_compile": True}, {}),
    "transformers_version": ({"transformers_version": "5.0"}, {}),
}
"""Fields that change greedy text: a value, and what else to ask for. The reference is transformers' own loop."""

SAME_TEXT = ["remove_invalid_values", "return_dict_in_generate", "renormalize_logits", "disable_compile"]
SAME_TEXT += ["transformers_version"]
"""Fields that act without another text."""

DRAWN = {
    "do_sample": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "top_h": {"top_h": 0.4},
    "min_p": {"min_p": 0.3},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "num_return_sequences": {"num_return_sequences": 3},
}
"""Fields that change how tokens are drawn: the set of tokens that can be drawn is compared."""

REFUSED = {
    "early_stopping": True, "num_beams": 2, "use_mtp": True, "use_cache": False, "cache_implementation": "static",
    "cache_config": {"a": 1}, "max_cache_len": 64, "length_penalty": 2.0, "token_healing": True, "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(), "output_attentions": True, "output_hidden_states": True,
    "output_scores": True, "output_logits": True, "decoder_start_token_id": 3, "is_assistant": True,
    "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": "dflash",
    "compile_config": CompileConfig(), "continuous_batching_config": {"page_size": 8}, "low_memory": True,
    "penalty_alpha": 0.6, "dola_layers": "low", "diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": [1],
    "force_words_ids": [[1]], "prefill_chunk_size": 4,
}  # fmt: skip
"""Fields that ask for what the modes do not have."""

WAYS = ("keyword", "argument", "model")
"""How a setting comes: as a keyword, with the argument ``generation_config``, with the model's own."""


def letters():
    """A tokenizer for stop strings: every id is one character."""
    alphabet = "abcdef" + "".join(chr(0x4E00 + n) for n in range(91))
    characters = {character: n for n, character in enumerate(alphabet)}
    made = Tokenizer(WordLevel(characters, unk_token=alphabet[96]))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def fields() -> list[str]:
    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]


def ask(model, way: str, settings: dict, prompt=IDS, **keywords):
    """``generate()`` with settings that come in one of three ways."""
    own = model.generation_config
    try:
        if way == "model":
            model.generation_config = copy.deepcopy(own)
            vars(model.generation_config).update(settings)
        if way == "keyword":
            keywords |= settings
        if way == "argument":
            keywords["generation_config"] = GenerationConfig(**settings)
        return model.generate(prompt, **keywords)
    finally:
        model.generation_config = own


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    found = {False: make_model(), True: make_model(**ONE_STAGE)}
    for model in found.values():
        model.generation_config.eos_token_id = None
    return found


def test_every_field_of_the_class_is_decided(record_property):
    decided = {*ACTS, *DRAWN, *REFUSED}
    assert decided == set(fields())
    assert {*ACTS, *DRAWN} == set(ACTING) and not ACTING & REFUSED.keys()
    defaults = GenerationConfig._get_default_generation_params()
    assert all(is_neutral(name, defaults.get(name)) for name in REFUSED)
    print(f"fields: tried {len(decided)}, acted {len(ACTING)}, refused {len(REFUSED)}")


def acting(mode: str):
    """Name, settings, prompt and further keywords of every field that acts."""
    for name, (settings, others) in ACTS.items():
        others = {"do_sample": False, "max_new_tokens": 14, **others}
        if name in ("max_length", "max_new_tokens"):
            others.pop("max_new_tokens")
        prompt = others.pop("prompt", IDS)
        if prompt is not None:
            others["attention_mask"] = torch.ones_like(prompt)
        others |= {"tokenizer": letters()} if name == "stop_strings" else {}
        yield name, settings, prompt, others


@pytest.mark.parametrize("mode", MODES)
def test_fields_that_act_give_the_text_of_transformers(models, mode):
    model, same, tried = models[mode == "stage"], [], 0
    for number, (name, settings, prompt, others) in enumerate(acting(mode)):
        expected = model.generate(prompt, **others, **settings)
        # Every field in all three ways in one mode, in turn in the others.
        for way in WAYS if mode == "full" else (WAYS[number % 3],):
            found = ask(model, way, settings, prompt, poe_mode=mode, poe_options=MODES[mode], **others)
            assert type(found) is type(expected)
            pair = (found, expected)
            found, plain = (out if isinstance(out, torch.Tensor) else out.sequences for out in pair)
            assert torch.equal(found, plain), (name, way)
            tried += 1
        if prompt is not None and torch.equal(plain, model.generate(prompt, **others)):
            same.append(name)
    print(f"{mode}: acted {tried}, without another text {len(same)}")
    # The one stage never writes a token of the prompt.
    assert [name for name in same if mode != "stage" or name != "encoder_no_repeat_ngram_size"] == SAME_TEXT


@pytest.mark.parametrize("mode", MODES)
def test_fields_that_do_not_act_are_refused_by_name(models, mode):
    model, tried = models[False], 0
    for name, value in REFUSED.items():
        for way in WAYS:
            with pytest.raises(ValueError) as caught:
                ask(model, way, {name: value}, poe_mode=mode, poe_options=MODES[mode], max_new_tokens=3)
            text = str(caught.value)
            assert name in text and f"poe_mode {mode!r}" in text and "\n" not in text, (name, way, text)
            tried += 1
    print(f"{mode}: refused {tried}")


def test_neutral_values_of_refused_fields_are_taken(models):
    defaults = GenerationConfig._get_default_generation_params()
    expected = models[False].generate(IDS, poe_mode="full", max_new_tokens=5)
    neutral = {name: defaults.get(name) for name in REFUSED}
    assert torch.equal(models[False].generate(IDS, poe_mode="full", max_new_tokens=5, **neutral), expected)
    flags = {name: False for name, value in REFUSED.items() if value is True}
    assert torch.equal(models[False].generate(IDS, poe_mode="full", max_new_tokens=5, **flags), expected)


def test_what_transformers_does_not_know_is_refused_whatever_brings_it(models):
    for way in WAYS:
        with pytest.raises(ValueError, match="poe_mode 'full' does not know no_repeat_ngram_sise"):
            ask(models[False], way, {"no_repeat_ngram_sise": 2}, poe_mode="full", max_new_tokens=3)
    given = {"position_ids": torch.arange(6)[None], "inputs_embeds": torch.zeros(1, 6, 48), "custom_generate": "x"}
    given |= {"token_type_ids": torch.zeros_like(IDS), "past_key_values": object(), "assistant_model": object()}
    given |= {"synced_gpus": True, "prefix_allowed_tokens_fn": lambda *a: [1], "negative_prompt_ids": IDS}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"poe_mode 'full' does not know {name}"):
            models[False].generate(IDS, poe_mode="full", max_new_tokens=3, **{name: value})


@pytest.fixture
def drawn_from(monkeypatch):
    """Distributions ``[B, V]`` that tokens are drawn from, by transformers' loop and by the modes."""
    seen: dict[str, list] = {"plain": [], "mode": []}
    multinomial, probabilities = torch.multinomial, TokenChoice.probabilities

    def noting_plain(weights, *args, **kwargs):
        seen["plain"].append(weights.clone())
        return multinomial(weights, *args, **kwargs)

    def noting_mode(self, logprobs):
        seen["mode"].append(probabilities(self, logprobs))
        return seen["mode"][-1]

    monkeypatch.setattr(torch, "multinomial", noting_plain)
    monkeypatch.setattr(TokenChoice, "probabilities", noting_mode)
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_fields_that_change_draws_give_the_distribution_of_transformers(models, mode, drawn_from):
    model, supports = models[mode == "stage"], {}
    for name, settings in DRAWN.items():
        for way in WAYS:
            for parts in drawn_from.values():
                parts.clear()
            settings = {"do_sample": True, **settings}
            plain = model.generate(IDS, max_new_tokens=1, **settings)
            found = ask(model, way, settings, max_new_tokens=1, poe_mode=mode, poe_options=MODES[mode])
            assert found.shape == plain.shape
            expected, given = drawn_from["plain"][0], drawn_from["mode"][0]
            torch.testing.assert_close(given.view_as(expected).float(), expected, rtol=1e-4, atol=1e-7)
            assert torch.equal(given.view_as(expected) > 0, expected > 0), (name, way)
            supports[name] = int((expected > 0).sum())
    print(f"{mode}: tried {len(DRAWN)} in {len(WAYS)} ways; tokens that can be drawn: {supports}")
    assert supports["do_sample"] == 100  # top_k is 50 where nobody sets it, with and without a mode
    narrow = ("top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    assert all(supports[name] < 100 for name in narrow)


def test_all_tokens_can_be_drawn_when_asked_for(models, drawn_from):
    for settings in ({"top_k": 0}, {"top_k": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0}):
        models[False].generate(IDS, poe_mode="full", do_sample=True, max_new_tokens=1, **settings)
        assert (drawn_from["mode"].pop() > 0).all()


@pytest.mark.parametrize("settings", [{"min_p": 0.2}, {"top_h": 0.6, "temperature": 1.4}, {"typical_p": 0.7}])
def test_speculation_draws_from_the_filtered_distribution_of_the_pool(settings):
    """The joint distribution of two tokens, with drafts that are wrong half of the time."""
    model = make_model(vocab_size=7)
    many = torch.tensor([[1, 2, 3]]).expand(3000, -1)
    settings = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": [], **settings}
    tables = []
    for mode in ("full", "speculative"):
        out = model.generate(many, poe_mode=mode, seed=5, **settings)[:, -2:]
        tables.append(torch.bincount(out[:, 0] * 7 + out[:, 1], minlength=49).double())
    expected, found = tables
    kept = expected + found > 20
    statistic = ((expected - found)[kept] ** 2 / (expected + found)[kept]).sum()
    assert statistic < kept.sum() + 5 * (2 * kept.sum()) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_repeat_ngram_size": -1}, None),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"bad_words_ids": []}, "bad_words_ids is"),
        ({"sequence_bias": {}}, "sequence_bias is"),
        ({"min_p": 3.0, "do_sample": True}, "min_p is 3.0"),
        ({"typical_p": -0.5, "do_sample": True}, "typical_p is -0.5"),
        ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty needs an eos_token_id"),
        ({"stop_strings": "x"}, "stop_strings needs tokenizer"),
        ({"max_length": 5}, "max_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"forced_eos_token_id": 4, "suppress_tokens": [4]}, "forced_eos_token_id"),
    ],
)
def test_values_that_transformers_refuses_are_refused_by_name(models, settings, message):
    if message is None:  # transformers takes a negative size for none
        assert torch.equal(models[False].generate(IDS, poe_mode="full", **settings), models[False].generate(IDS))
        return
    with pytest.raises(ValueError, match=message):
        models[False].generate(IDS, poe_mode="full", **settings)


@pytest.mark.parametrize("mode", MODES)
def test_options_of_another_mode_are_refused(models, mode):
    tried = 0
    for other, options in MODES.items():
        own = {**MODES[mode]}
        for name, value in options.items():
            if name in own:
                continue
            tried += 1
            with pytest.raises(ValueError, match=f"poe_mode '{mode}' has no option {name}: it belongs to {other}"):
                models[False].generate(IDS, poe_mode=mode, poe_options={**own, name: value})
    with pytest.raises(ValueError, match="has no option nothing: no mode has it"):
        models[False].generate(IDS, poe_mode=mode, poe_options={"nothing": 1})
    print(f"{mode}: refused {tried + 1} options")
    assert mode in METHODS and tried


def test_what_a_mode_needs_and_options_without_a_mode(models):
    for mode, need in (("stage", "stage"), ("parallel", "stages")):
        with pytest.raises(ValueError, match=f"poe_mode '{mode}' needs {need}: pass poe_options"):
            models[False].generate(IDS, poe_mode=mode)
    with pytest.raises(ValueError, match="poe_options says how a mode runs: pass poe_mode as well"):
        models[False].generate(IDS, poe_options={"stage": 1})
    with pytest.raises(TypeError, match="unexpected keyword argument: num_beams"):
        models[False].generate_prefix(IDS, num_beams=4)


def test_where_the_mode_comes_from(models):
    model = models[False]
    stage = model.generate_stage(IDS, 0, max_new_tokens=9)
    full = model.generate(IDS, poe_mode="full", max_new_tokens=9)
    assert not torch.equal(stage, full)
    held = {"poe_mode": "stage", "poe_options": {"stage": 0}}
    for way in ("argument", "model"):
        assert torch.equal(ask(model, way, held, max_new_tokens=9), stage)
        assert torch.equal(ask(model, way, held, max_new_tokens=9, poe_mode="stage"), stage)
        assert torch.equal(ask(model, way, held, max_new_tokens=9, poe_mode="full"), full)
    seeds = [ask(model, way, {"seed": 3}, poe_mode="full", do_sample=True, max_new_tokens=9) for way in WAYS]
    assert torch.equal(seeds[0], seeds[1]) and torch.equal(seeds[0], seeds[2])
    assert OWN == ("poe_mode", "poe_options", "seed")


def test_padding_is_found_as_transformers_finds_it(models):
    model, ids = models[False], torch.tensor([[96, 96, 5, 9, 2], [7, 3, 3, 1, 4]])
    settings = {"pad_token_id": 96, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, poe_mode="full", **settings), expected)
    alone = model.generate(ids[:1, 2:], poe_mode="full", **settings)
    assert torch.equal(alone[0, -9:], expected[0, -9:])


# ---- options of the command line ------------------------------------------------------------------------------------
