"""What transformers' generation settings mean to the modes: each acts as it does there, or is refused by its name.

A setting may come as a keyword of ``generate()``, with its ``generation_config`` or with the model's own, in this
order; what nobody sets has transformers' defaults. Settings that change scores or end rows become transformers' own
processors and criteria, asked row by row: a row's padding is no text. All fields of the class that are not named here
are refused when they ask for something, those that a later version adds among them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from .configuration_cognica_poe import check

SCORES = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
)  # fmt: skip
"""Settings that change the scores of a token before it is chosen."""

FILTERS = ("temperature", "top_k", "top_p")
"""Settings that change the distribution that a token is drawn from; the others are ``RARE_FILTERS``."""

RARE_FILTERS = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Further ones, for which transformers' own code filters, in its order."""

ENDS = ("max_length", "max_new_tokens", "min_length", "eos_token_id", "stop_strings", "max_time")
"""Settings that end a row."""

SHAPE = ("bos_token_id", "pad_token_id", "do_sample", "num_return_sequences", "return_dict_in_generate")
"""Settings that say what goes in and comes out."""

WITHOUT_EFFECT = ("renormalize_logits", "disable_compile", "transformers_version")
"""Whatever their value: a distribution is always normalised, and nothing is compiled unless told by
``prepare_decoding``."""

ACTING = frozenset((*SCORES, *FILTERS, *RARE_FILTERS, *ENDS, *SHAPE, *WITHOUT_EFFECT))
"""Fields of ``GenerationConfig`` that act in every mode."""

OWN = ("poe_mode", "poe_options", "seed")
"""Settings of this model that a generation config may hold."""

PASSED = ("attention_mask", "streamer", "tokenizer", "stopping_criteria", "logits_processor")
"""Arguments of ``generate()`` that are no settings and that the modes take."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether a setting asks for nothing: it is None, transformers' default, or False where that is no request."""
    default = GenerationConfig._get_default_generation_params().get(name)
    nothing = value is None or (value is False and not default)
    # A list or a table is no default of any setting.
    return nothing or (name == "cache_implementation" and value == "dynamic") or bool(value == default)


def read_settings(model, mode: str, inputs: torch.Tensor | None, generation_config, kwargs: dict) -> tuple[dict, bool]:
    """What a call of ``generate()`` in a mode asks for.

    Args:
        model: the model that answers.
        mode: its name, for messages.
        inputs: prompt ids ``[B, T]``; those in ``kwargs``, else a single beginning of a text, when None.
        generation_config: as in transformers, may be None.
        kwargs: what else was given to ``generate()``; taken apart.

    Returns:
        arguments of the mode's method, ``input_ids`` first, and whether the answer is to come as a dict.

    Raises:
        ValueError: a setting or an argument that the modes do not have, or values that transformers refuses.
    """
    ids = _prompt(mode, inputs, kwargs)
    passed = {name: kwargs.pop(name) for name in PASSED if name in kwargs}
    seed, lengths = kwargs.pop("seed", None), ("max_length", "min_length")
    asked = [kwargs, *(vars(config) for config in (generation_config, model.generation_config) if config is not None)]
    unset = {name: all(source.get(name) is None for source in asked) for name in lengths}
    try:
        config, rest = model._prepare_generation_config(generation_config, **kwargs)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"poe_mode {mode!r}: {error}") from error
    _refuse_others(mode, config, rest)
    ends = config.eos_token_id
    config.eos_token_id = None if isinstance(ends, list | tuple) and not ends else ends
    if ids is None:
        check(config.bos_token_id is not None, "generate() needs input_ids: [batch, tokens]")
        ids = torch.full((1, 1), config.bos_token_id, device=model.device)
    has_mask = passed.get("attention_mask") is not None
    prepared = copy.copy(config)  # transformers adds tensors of the special tokens
    model._prepare_special_tokens(prepared, has_mask, device=ids.device, batch_size=ids.shape[0])
    if not has_mask and ids.ndim == 2:
        mask = model._prepare_attention_mask_for_generation(ids, prepared, {})
        passed["attention_mask"] = None if bool(mask.all()) else mask
    config = _measured(model, config, ids, **unset)
    fields = {name: value for name in (*SCORES, "max_time") if not is_neutral(name, value := getattr(config, name))}
    fields |= {"max_new_tokens": config.max_length - ids.shape[1], "stop_strings": config.stop_strings}
    fields["min_new_tokens"] = max((config.min_length or 0) - ids.shape[1], 0) or None
    fields |= {"eos_token_id": [] if config.eos_token_id is None else config.eos_token_id}
    fields |= {"pad_token_id": config.pad_token_id, "do_sample": bool(config.do_sample)}
    fields["seed"] = getattr(config, "seed", None) if seed is None else seed
    if config.do_sample:  # a config may hold both; greedy decoding asks for no temperature
        fields |= {name: getattr(config, name) for name in (*FILTERS, *RARE_FILTERS)}
        fields["top_k"] = config.top_k or None  # 0 is transformers' way to say all tokens
    fields = {name: value for name, value in {**fields, **passed}.items() if value is not None}
    return _several(fields, ids, config.num_return_sequences or 1), bool(config.return_dict_in_generate)


def row_processors(
    model, prompts: Sequence[torch.Tensor], max_new_tokens: int, eos: Sequence[int], fields: dict, processors
) -> list[LogitsProcessorList]:
    """Transformers' own processors for every row, in its order; no list at all when nothing changes scores.

    Args:
        model: the model that answers.
        prompts: ids ``[T_r]`` of every row.
        max_new_tokens: tokens to generate at most.
        eos: ids that end a row.
        fields: values by the names of ``SCORES``; those that ask for nothing are left out.
        processors: the caller's own, or None.

    Raises:
        ValueError: a value that transformers refuses; the message names the field.
    """
    if not fields:
        return [LogitsProcessorList(processors)] * len(prompts) if processors else []
    needs = "exponential_decay_length_penalty"
    check(needs not in fields or bool(eos), f"{needs} needs an eos_token_id, whose score it raises")

    def build(fields: dict, prompt: torch.Tensor) -> LogitsProcessorList:
        config = GenerationConfig(**fields, eos_token_id=list(eos) or None, do_sample=False, num_beams=1)
        config.max_length = len(prompt) + max_new_tokens
        model._prepare_special_tokens(config, device=model.device)
        return model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=prompt[None],
            logits_processor=LogitsProcessorList(processors or []),
            device=model.device,
            model_kwargs={},
        )

    def of_row(prompt: torch.Tensor) -> LogitsProcessorList:
        return named(fields, lambda some: build(some, prompt))

    return [of_row(prompt) for prompt in prompts]


def filters(model, fields: dict) -> LogitsProcessorList | None:
    """Transformers' own chain of filters when one of ``RARE_FILTERS`` asks for something, else None.

    Raises:
        ValueError: a value that transformers refuses; the message names the field.
    """
    if all(is_neutral(name, fields.get(name)) for name in RARE_FILTERS):
        return None

    def build(some: dict) -> LogitsProcessorList:
        config = GenerationConfig(**some, do_sample=True, num_beams=1)
        return model._get_logits_processor(config, input_ids_seq_length=1, device=model.device, model_kwargs={})

    return named({name: value for name, value in fields.items() if value is not None}, build)


def named(fields: dict, build: Callable[[dict], LogitsProcessorList]) -> LogitsProcessorList:
    """``build(fields)``, whose error names the field that it comes from."""
    try:
        return build(fields)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        for name, value in fields.items():
            try:
                build({name: value})
            except type(error) as own:
                raise ValueError(f"{name} is {value!r}: {own}") from error
        raise


def _prompt(mode: str, inputs: torch.Tensor | None, kwargs: dict) -> torch.Tensor | None:
    ids = kwargs.pop("input_ids", None)
    check(inputs is None or ids is None, f"poe_mode {mode!r}: both inputs and input_ids are given; pass one of them")
    return ids if inputs is None else inputs


def _refuse_others(mode: str, config: GenerationConfig, rest: dict) -> None:
    """Raise ValueError for settings and arguments that ask for what the modes do not have."""
    known = (*ACTING, *OWN)
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in known}
    unknown = [name for name, value in fields.items() if not is_neutral(name, value)]
    unknown += [name for name, value in rest.items() if not (name in unknown or value is None or value is False)]
    check(not unknown, f"poe_mode {mode!r} does not know {', '.join(unknown)}; leave it out, or poe_mode itself")


def _measured(model, config: GenerationConfig, ids: torch.Tensor, max_length: bool, min_length: bool):
    """The config with ``max_length`` and ``min_length`` in tokens, as transformers works them out."""
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=max_length,
        has_default_min_length=min_length,
        model_input_name="input_ids",
        input_ids_length=ids.shape[-1],
        inputs_tensor=ids,
    )
    model._validate_generated_length(config, ids.shape[-1], max_length)
    if ids.shape[-1] > 1:
        config.forced_bos_token_id = None  # it is the second token of a text
    return config


def _several(fields: dict, ids: torch.Tensor, count: int) -> dict:
    """Arguments with every row ``count`` times."""
    if count > 1:
        ids = ids.repeat_interleave(count, dim=0)
        if (mask := fields.get("attention_mask")) is not None:
            fields["attention_mask"] = mask.repeat_interleave(count, dim=0)
    return {"input_ids": ids, **fields}
