"""The capability table: which probe was answered rightly at which step, and secondary facts beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cognica_poe.release.text import MISSING, count, markdown_table, markdown_text

_LONGEST = 28  # characters of an answer in a cell


def anecdote(prompts: Sequence[str]) -> str:
    """What the table is worth, said where it stands."""
    number = {7: "Seven"}.get(len(prompts), count(len(prompts)))
    are = "prompts are" if len(prompts) != 1 else "prompt is"
    return (
        f"{number} {are} an anecdote, not a benchmark: one greedy continuation each, graded by rule. The first "
        "asserted answer counts; a loop, a list of choices or an echo of the prompt is no answer."
    )


def verdict(probe: Mapping[str, Any], escape: Callable[[str], str] = str) -> str:
    """``right: Au``, ``wrong: Saturday`` or ``none (loop)``; what a model wrote passes through ``escape``."""
    answer = probe.get("answer")
    if answer is None:
        return f"none ({probe.get('reason') or 'no answer'})"
    shown = str(answer) if len(str(answer)) <= _LONGEST else f"{str(answer)[:_LONGEST]}..."
    return f"{'right' if probe.get('correct') else 'wrong'}: {escape(shown)}"


@dataclass(frozen=True)
class Capabilities:
    """``columns``: prompts, then secondary facts by name, plain text; ``rows``: ``(step, cells)``, answers escaped."""

    prompts: list[str]
    columns: list[str]
    rows: list[tuple[int, list[str]]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], escape: Callable[[str], str] = str) -> Capabilities:
        """Of records in the order given; a prompt that a record lacks is a dash there."""
        prompts: list[str] = []
        facts: list[tuple[str, str]] = []
        for record in records:
            for probe in record.get("probes") or []:
                prompt = str(probe.get("prompt"))
                prompts += [prompt] if prompt not in prompts else []
                facts += [(prompt, name) for name in probe.get("facts") or {} if (prompt, name) not in facts]
        rows = []
        for record in records:
            by_prompt = {str(probe.get("prompt")): probe for probe in record.get("probes") or []}
            cells = [verdict(by_prompt[prompt], escape) if prompt in by_prompt else MISSING for prompt in prompts]
            cells += [_fact((by_prompt.get(prompt) or {}).get("facts") or {}, name) for prompt, name in facts]
            rows.append((record["step"], cells))
        return cls(prompts, [*prompts, *(name for _, name in facts)], rows)


def _fact(facts: Mapping[str, Any], name: str) -> str:
    stated = facts.get(name)
    return MISSING if stated is None else "yes" if stated else "no"


def capabilities(records: Sequence[Mapping[str, Any]]) -> str:
    """Section of the card; empty where no record has probes."""
    found = Capabilities.of(records, markdown_text)
    if not found.prompts:
        return ""
    number = len(found.prompts)
    header = ["step", *map(str, range(1, number + 1)), *(markdown_text(name, 60) for name in found.columns[number:])]
    rows = [[count(step), *cells] for step, cells in found.rows]
    table = markdown_table(header, rows, "r" + "l" * len(found.columns))
    named = "\n".join(f"{place}. {markdown_text(prompt)}" for place, prompt in enumerate(found.prompts, start=1))
    return f"## Capabilities\n\n{anecdote(found.prompts)}\n\n{named}\n\n{table}"
