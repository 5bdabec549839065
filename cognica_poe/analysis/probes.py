"""The seven greedy probes: fixed prompts, one deterministic continuation each, graded by rule.

The prompts are nanochat's sample prompts (``scripts/base_train.py``), word for word, which the model card tracks over
checkpoints. Grades are mechanical (``grading``), so that they do not depend on who reads: the first asserted answer
counts ("Saturday ... Sunday" is wrong). Seven prompts are an anecdote, not a benchmark: a record shows the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.analysis.grading import (
    Fact,
    Grade,
    Rule,
    atomic_number,
    chemical_symbol,
    day_chain,
    first_named,
    grade,
    planet_list,
    unknown_x,
)

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

TOKENS = 60
"""Length of a continuation, as in the model card."""
_NO_PLACE = r"(?:The|It|Its|In|This|That|And|France|French|Capital|City)\b"
_DAYS = r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
_COLORS = (
    "red blue green yellow black white purple orange pink brown gr[ae]y gold silver violet turquoise teal crimson "
    "magenta cyan indigo maroon navy lavender beige"
)
_COLOR = r"\b(?:" + "|".join(_COLORS.split()) + r")\b"
_HOT = r"\b(?:cold|cool|warm|hot|heat|dry|wet|freezing|icy)\b"


@dataclass(frozen=True)
class Probe:
    """A prompt, its expected answer, the rule that grades a continuation, and secondary facts by name."""

    prompt: str
    expected: str
    rule: Rule
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def grade(self, continuation: str) -> Grade:
        """What the continuation asserts, and whether that is right."""
        return grade(self.prompt, continuation, self.rule)


PROBES = (
    # Any capitalised word is a candidate place: "the city of Lyon ... Paris" names Lyon first.
    Probe(
        "The capital of France is",
        "Paris",
        first_named(rf"\b(?!{_NO_PLACE})[A-Z][\w-]+", "Paris", ignore_case=False),
    ),
    Probe("The chemical symbol of gold is", "Au", chemical_symbol("Au"), {"atomic number 79": atomic_number(79)}),
    Probe(
        "If yesterday was Friday, then tomorrow will be",
        "Sunday",
        first_named(_DAYS, "Sunday"),
        {"+1-day chain": day_chain},
    ),
    Probe("The opposite of hot is", "cold", first_named(_HOT, "cold")),
    Probe(
        "The planets of the solar system are:",
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune",
        planet_list,
    ),
    Probe("My favorite color is", "any color", first_named(_COLOR, _COLOR)),
    Probe("If 5*x + 3 = 13, then x is", "2", unknown_x(2)),
)


@dataclass(frozen=True)
class ProbeResult:
    """One graded continuation: ``answer`` as asserted, or ``reason`` why there is none; facts by name (None: not
    spoken of)."""

    prompt: str
    continuation: str
    expected: str
    correct: bool
    answer: str | None
    reason: str | None
    facts: dict[str, bool | None]


def run_probes(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    *,
    new_tokens: int = TOKENS,
    probes: Sequence[Probe] = PROBES,
    log: Callable[[str], None] = lambda line: None,
) -> list[ProbeResult]:
    """Greedy continuation of every probe (BOS prepended, one row per call, so that no padding can matter).

    The continuation ends before the first special token, and where the context is full.
    """
    device = next(model.parameters()).device
    special = {index for index, size in enumerate(tokenizer.token_bytes) if size == 0}
    results = []
    with evaluation_mode(model):
        for probe in probes:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(probe.prompt)]], device=device)
            length = min(new_tokens, model.config.max_position_embeddings - ids.shape[1])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, num_beams=1
            )
            new = out[0, ids.shape[1] :].tolist()
            end = next((place for place, index in enumerate(new) if index in special), len(new))
            text = tokenizer.decode(new[:end])
            results.append(_result(probe, text))
    log(f"probes: {sum(result.correct for result in results)} of {len(results)} correct")
    return results


def _result(probe: Probe, text: str) -> ProbeResult:
    found = probe.grade(text)
    facts = {name: fact(text) for name, fact in probe.facts.items()}
    return ProbeResult(probe.prompt, text, probe.expected, found.correct, found.answer, found.reason, facts)
