"""The tables of stage diversity: geometry of the heads over steps, and what heads off or scaled do at one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cognica_poe.release.card.readings import Record
from cognica_poe.release.card.section import Section, over_steps
from cognica_poe.release.text import MISSING, count, percent, signed
from cognica_poe.release.trajectory import Row, Trajectory

_TOGETHER = 0.9  # signed cosine from which two stages are said to be of one cluster


def diversity(trajectory: Trajectory) -> list[Section]:
    """Those of the tables that the records have figures for."""
    measured = [record for record in trajectory.records if record.get("heads")]
    if not measured:
        return []
    found = [geometry(trajectory, len(measured[-1]["heads"]["norm"])), tokens(measured[-1])]
    perturbed = [record for record in measured if record["heads"].get("perturbations")]
    if perturbed:
        found += [switched_off(perturbed[-1]), scaled(perturbed[-1]), recalled(perturbed[-1])]
    return [section for section in found if section is not None]


def geometry(trajectory: Trajectory, stages: int) -> Section:
    """Unique shares and clusters by step."""

    def cells(_: Row, record: Record) -> list[str]:
        heads = record.get("heads") or {}
        stored = (heads.get("unique_share") or [None] * stages)[1:]
        budget = sum(stored) if stored and None not in stored else None
        folded, centred = heads.get("folded") or {}, heads.get("centred") or {}
        return [
            *(percent(share) for share in stored), percent(budget),
            clusters(heads.get("alignment")), clusters(folded.get("alignment")), clusters(centred.get("alignment")),
            *(percent(share) for share in (folded.get("unique_share") or [None] * stages)[1:]),
        ]  # fmt: skip

    header = [*(f"unique {k}" for k in range(1, stages)), "budget", "clusters", "folded clusters", "centred clusters"]
    header += [f"folded unique {k}" for k in range(1, stages)]
    text = (
        "Unique: squared norm of a stage head outside the span of the heads before it, of its own; the budget is their "
        "sum, as the original counts it. Clusters: stages whose dominant singular vectors have a signed cosine of "
        f"{_TOGETHER} or more. The shared head is redundant with the stage heads, so that these figures of the stored "
        "heads say as much of the optimiser as of the function; folded (shared plus own) and centred (own less the "
        "mean of all) heads do not depend on that split."
    )
    return over_steps("Stage diversity", text, header, trajectory, cells)


def clusters(alignment: Sequence[Sequence[float | None]] | None) -> str:
    """``{0, 1} {2}``: stages that a chain of cosines of 0.9 or more connects; a dash where one has none."""
    if not alignment or any(value is None for row in alignment for value in row):
        return MISSING
    groups: list[set[int]] = []
    for stage, row in enumerate(alignment):
        near = {other for other, value in enumerate(row) if value is not None and value >= _TOGETHER} | {stage}
        touching = [group for group in groups if group & near]
        groups = [group for group in groups if not group & near] + [near.union(*touching)]
    return " ".join("{" + ", ".join(map(str, sorted(group))) + "}" for group in sorted(groups, key=min))


def tokens(record: Record) -> Section | None:
    """Top tokens of every stage head, spelled as bytes."""
    top = record["heads"].get("top_tokens") or []
    if not any(top):
        return None
    rows = [[f"stage {stage}", "  ".join(some)] for stage, some in enumerate(top)]
    text = f"Tokens of the dominant singular vector at step {count(record['step'])}; bytes that are no text as \\xNN."
    return Section("Top tokens of the stage heads", text, ["head", "tokens"], rows, first_is_words=True, foreign=True)


def _about(record: Record) -> str:
    heads = record["heads"]
    return (
        f"at step {count(record['step'])} on {count(heads.get('tokens'))} held-out tokens of "
        f"{count(heads.get('units'))} documents or files, with paired 95 % intervals"
    )


def _change(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return MISSING
    return f"{signed(item['value'])} [{signed(item['low'])}, {signed(item['high'])}]"


def switched_off(record: Record) -> Section:
    """One stage head off at a time, in either gauge."""
    found = {(item["gauge"], item["stage"]): item for item in record["heads"]["perturbations"] if item["beta"] == 0.0}
    stages = sorted({stage for _, stage in found if stage is not None})
    rows = [[f"stage {k}", _change(found.get(("stored", k))), _change(found.get(("centred", k)))] for k in stages]
    text = (
        f"Change of the full pool's bits per byte {_about(record)}. Off: the stage head is zero. Replaced: it is the "
        "mean of all stage heads, so that only what it has of its own is lost."
    )
    return Section("One stage head off", text, ["head", "off", "replaced"], rows, first_is_words=True)


def scaled(record: Record) -> Section:
    """All stage heads times beta, in either gauge."""
    found = {(item["gauge"], item["beta"]): item for item in record["heads"]["perturbations"] if item["stage"] is None}
    rows = [
        [f"{beta:g}", _change(found.get(("stored", beta))), _change(found.get(("centred", beta)))]
        for beta in sorted({beta for _, beta in found})
    ]
    text = (
        f"Change of the full pool's bits per byte with all stage heads times beta, {_about(record)}. Stored: the heads "
        "as they are. Centred: what each has beyond their mean, which stays; at 0 all stages share one head."
    )
    return Section("Stage heads times beta", text, ["beta", "stored", "centred"], rows)


def recalled(record: Record) -> Section | None:
    """Probability and rank of the right answers, by beta."""
    found = [item for item in record["heads"].get("recall") or [] if item["gauge"] == "stored"]
    if not found:
        return None
    facts = list(dict.fromkeys((item["prompt"], item["answer"]) for item in found))
    at = {(item["prompt"], item["beta"]): item for item in found}
    rows = [
        [f"{beta:g}", *(_recall(at.get((prompt, beta))) for prompt, _ in facts)]
        for beta in sorted({item["beta"] for item in found})
    ]
    text = (
        "Probability of the right answer behind its prompt, and rank of its first token, with all stored stage heads "
        "times beta: " + "; ".join(f"{prompt} ... {answer}" for prompt, answer in facts) + "."
    )
    return Section("Facts recalled, by beta", text, ["beta", *(answer for _, answer in facts)], rows)


def _recall(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return MISSING
    return f"{item['probability']:.2e} (rank {count(item['rank'])})"
