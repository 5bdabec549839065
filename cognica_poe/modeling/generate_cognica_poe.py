"""The modes behind transformers' ``generate()``: its generation config translated into a mode's arguments."""

from __future__ import annotations

import torch

MODES = {
    "full": "generate_prefix",
    "prefix": "generate_prefix",
    "stage": "generate_stage",
    "wand": "generate_wand",
    "speculative": "generate_speculative",
    "parallel": "generate_parallel_composition",
}
"""Method of every ``poe_mode``."""

SAMPLING = ("temperature", "top_k", "top_p")
SHARED = ("do_sample", "repetition_penalty", "eos_token_id", "pad_token_id", "max_new_tokens", "stop_strings")
PASSED = ("attention_mask", "streamer", "tokenizer", "stopping_criteria", "logits_processor", "seed")
IGNORED = ("use_cache", "cache_implementation", "position_ids", "token_type_ids", "custom_generate", "synced_gpus")
UNSUPPORTED = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "min_p": None}
"""Settings of transformers that the modes do not have, with the value that asks for nothing."""


def run_mode(model, mode: str, options: dict, inputs: torch.Tensor | None, config, kwargs: dict) -> torch.Tensor:
    """Answer a call of ``generate()`` with a mode of the model.

    Args:
        model: the causal language model.
        mode: key of ``MODES``.
        options: the mode's own arguments, such as ``{"drafter": "lookup", "k_draft": 7}``.
        inputs: prompts ``[B, T]`` or None when ``kwargs`` holds ``input_ids``.
        config: generation config; keyword arguments come before it.
        kwargs: keyword arguments of ``generate()``.

    Raises:
        ValueError: no such mode, or a setting that the modes do not have.
    """
    if mode not in MODES:
        raise ValueError(f"poe_mode {mode!r} does not exist; choose one of {', '.join(MODES)}")
    kwargs = dict(kwargs)
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if ids is None:
        raise ValueError("generate() needs input_ids: [batch, tokens]")
    given = {name: kwargs.pop(name, getattr(config, name, None)) for name in (*SHARED, *SAMPLING, *UNSUPPORTED)}
    max_length = kwargs.pop("max_length", None)
    passed = {name: kwargs.pop(name) for name in PASSED if kwargs.get(name) is not None}
    unknown = [name for name, value in kwargs.items() if value is not None and name not in (*IGNORED, *PASSED)]
    unknown += [name for name, nothing in UNSUPPORTED.items() if given.pop(name) not in (nothing, None)]
    if unknown:
        raise ValueError(f"poe_mode {mode!r} does not know {', '.join(unknown)}; leave it out, or poe_mode itself")
    if given["max_new_tokens"] is None:
        given["max_new_tokens"] = max_length - ids.shape[1] if max_length else _room(model, ids, config)
    if not given["do_sample"]:  # a config may hold both; greedy decoding asks for no temperature
        given = {name: value for name, value in given.items() if name not in SAMPLING}
    elif given["top_k"] == 0:  # transformers' way to say all tokens
        given["top_k"] = None
    given = {name: value for name, value in given.items() if value is not None}
    return getattr(model, MODES[mode])(ids, **options, **given, **passed)


def _room(model, ids: torch.Tensor, config) -> int:
    """New tokens when nobody says how many: the config's ``max_length``, at most what the context holds."""
    limit = model.config.max_position_embeddings
    longest = min(getattr(config, "max_length", None) or 20 + ids.shape[1], limit)
    return max(longest - ids.shape[1], 1)
