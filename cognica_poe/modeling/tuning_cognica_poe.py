"""Which drafter pays on this machine: measured on the request at hand, remembered for its batch size."""

from __future__ import annotations

import dataclasses
import time

from .engine_cognica_poe import Engines
from .loops_cognica_poe import decode_all, decode_speculative
from .request_cognica_poe import GenerationRequest

TRIAL_TOKENS = 48
"""New tokens of one trial."""

CANDIDATES = (("stage", 4), ("stage", 8), ("int8", 7), ("int4", 7), ("lookup", 7), ("lookup", 15))
"""Drafters and draft lengths that are tried, beside none at all."""


def choose_drafter(model, request: GenerationRequest, draft_stage: int) -> tuple[str | None, int]:
    """The fastest of no drafter and ``CANDIDATES`` for this model, batch size and kind of choice.

    Every candidate answers the beginning of the request twice, in turns, and the better time counts. A small advantage
    over plain decoding is no reason to speculate.

    Returns:
        drafter (None: decode plainly) and draft length.
    """
    measured = Engines.of(model).measured
    key = (len(request.lengths), request.choice.do_sample, draft_stage)
    if key not in measured:
        trial = dataclasses.replace(request, max_new_tokens=min(TRIAL_TOKENS, request.max_new_tokens), streamer=None)
        narrow = model.config.hidden_size % 32 or model.config.intermediate_size % 32
        candidates = [(name, k) for name, k in CANDIDATES if not (narrow and name == "int4")]
        seconds = {candidate: float("inf") for candidate in [(None, 0), *candidates]}
        decode_all(model, dataclasses.replace(trial, max_new_tokens=1))  # arranging the weights is not decoding
        for _ in range(2):
            for name, k in seconds:
                began = time.perf_counter()
                if name is None:
                    decode_all(model, trial)
                else:
                    decode_speculative(model, trial, draft_stage, k, name)
                seconds[name, k] = min(seconds[name, k], time.perf_counter() - began)
        best = min(seconds, key=seconds.__getitem__)
        measured[key] = best if seconds[best] < 0.95 * seconds[None, 0] else (None, 0)
    return measured[key]
