"""The seven greedy probes: fixed prompts, one deterministic continuation each, graded by rule.

The prompts are nanochat's sample prompts (``scripts/base_train.py``), word for word, which the model card tracks over
checkpoints. Grades are strict and mechanical: an answer counts if it is the first of its kind that the continuation
names ("Saturday ... Sunday" is wrong), so that a grade does not depend on who reads it. Seven prompts are an anecdote,
not a benchmark: a record shows the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cognica_poe.analysis.conditions import evaluation_mode

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

_NO_PLACE = r"(?:The|It|Its|In|This|That|And|France|French|Capital|City)\b"
_DAYS = r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
_BODIES = r"\b(?:Mercury|Venus|Earth|Mars|Jupiter|Saturn|Uranus|Neptune|Pluto|Sun|Moon)\b"
_PLANETS = "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"
_COLORS = (
    "red blue green yellow black white purple orange pink brown gr[ae]y gold silver violet turquoise teal crimson "
    "magenta cyan indigo maroon navy lavender beige"
)
_COLOR = r"\b(?:" + "|".join(_COLORS.split()) + r")\b"


@dataclass(frozen=True)
class Probe:
    """A prompt, its expected answer, and the rule that grades a continuation.

    ``answer`` must match the comma-joined first ``count`` matches of ``candidates``, both ignoring case where
    ``ignore_case``.
    """

    prompt: str
    expected: str
    candidates: str
    answer: str
    count: int = 1
    ignore_case: bool = True

    def correct(self, continuation: str) -> bool:
        """Whether the first candidates that the continuation names are the expected answer."""
        flags = re.IGNORECASE if self.ignore_case else 0
        named = [match.group() for match in re.finditer(self.candidates, continuation, flags)]
        return re.fullmatch(self.answer, ", ".join(named[: self.count]), flags) is not None


PROBES = (
    # Any capitalised word is a candidate place: "the city of Lyon ... Paris" names Lyon first.
    Probe("The capital of France is", "Paris", rf"\b(?!{_NO_PLACE})[A-Z][\w-]+", "Paris", ignore_case=False),
    Probe("The chemical symbol of gold is", "Au", r"\b[A-Z][a-z]?\b(?!')", "Au", ignore_case=False),
    Probe("If yesterday was Friday, then tomorrow will be", "Sunday", _DAYS, "Sunday"),
    Probe("The opposite of hot is", "cold", r"\b(?:cold|cool|warm|hot|heat|dry|wet|not|freezing|icy)\b", "cold"),
    Probe("The planets of the solar system are:", _PLANETS, _BODIES, _PLANETS, count=8),
    Probe("My favorite color is", "any color", _COLOR, _COLOR),
    Probe("If 5*x + 3 = 13, then x is", "2", r"-?\d+(?:[./]\d+)?|\b(?:one|two|three|four|five|six|ten)\b", "2|two"),
)


@dataclass(frozen=True)
class ProbeResult:
    """One graded continuation."""

    prompt: str
    continuation: str
    expected: str
    correct: bool


def run_probes(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    *,
    new_tokens: int = 48,
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
            results.append(ProbeResult(probe.prompt, text, probe.expected, probe.correct(text)))
    log(f"probes: {sum(result.correct for result in results)} of {len(results)} correct")
    return results
