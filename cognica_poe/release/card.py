"""The model card: Markdown rendered from analysis records and the release description alone.

No figure is typed by hand: rendering the same records gives the same text to the byte, so drift between a card and its
records is a failed comparison. Text that a model wrote is escaped (``text.markdown_text``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.release.text import (
    MISSING,
    count,
    interval,
    markdown_table,
    markdown_text,
    number,
    percent,
    signed,
    visible,
)

_CITATION = """```bibtex
@misc{jeong2026poe,
  author    = {Jeong, Jaepil},
  title     = {Product of Experts as Scalable Local Learning: Modular Construction at 1.3B Parameters},
  year      = {2026},
  doi       = {10.5281/zenodo.19547653},
  publisher = {Zenodo},
}
```"""

Record = Mapping[str, Any]


def render_card(records: Sequence[Record], release: Mapping[str, Any]) -> str:
    """Markdown of the card (front matter, tables, usage).

    ``records``: analysis records (JSON layout of ``AnalysisRecord``), any order, one per step; the highest step is the
    one the card describes. ``release``: ``name``, ``repo_id`` and, where known, ``license``, ``languages``,
    ``description``, ``config`` (the model's config.json), ``data`` (the data manifest) and ``revisions``
    (``{step: commit sha}``). Raises UserError when there is no record, or two of one step.
    """
    if not records:
        raise UserError("no analysis record to make a card from: run `cognica-poe analyze` first")
    records = sorted(records, key=lambda record: record["step"])
    steps = [record["step"] for record in records]
    if len(set(steps)) != len(steps):
        raise UserError(f"two analysis records of one step among {steps}: a card takes one record per step")
    latest = records[-1]
    sections = [
        _front_matter(latest, release),
        _introduction(latest, release),
        _how_to_load(records, release),
        _architecture(latest, release),
        _measurements(latest),
        _trajectory(records, release),
        _bounds(records),
        _speculation(records),
        _baselines(latest),
        _probes(latest),
        _data(latest, release),
        _closing(latest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def stage_count(record: Record) -> int:
    """K, from the record's own stage figures."""
    return len(record["bpb"]["stage"])


def is_pool(record: Record) -> bool:
    """Whether the pooled stage heads are the trained path (False: the plain backprop path)."""
    return record.get("path", "pool") == "pool"


def trained_path(record: Record) -> str:
    """Key in ``bpb`` of the path the model was trained on."""
    return "full" if is_pool(record) else "plain"


def _front_matter(record: Record, release: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    tags = ["causal-lm", "pretraining"]
    if is_pool(record):
        tags += ["product-of-experts", "per-stage-head", "local-learning", "early-exit", "speculative-decoding"]
    data = ModelCardData(
        license=release.get("license", "apache-2.0"),
        language=release.get("languages") or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(record: Record, release: Mapping[str, Any]) -> str:
    model, stages = record["model"], stage_count(record)
    lines = [f"# {markdown_text(release['name'])}", ""]
    kind = "Product-of-Experts language model" if is_pool(record) else "causal language model (backprop control arm)"
    lines.append(
        f"A {count(model.get('parameters'))}-parameter {kind} at step {count(record['step'])} "
        f"({count(record.get('tokens_seen'))} tokens seen)."
    )
    if is_pool(record):
        lines.append(
            f"Its trunk is cut into {stages} stages, each with its own prediction head; the pool of the heads is the "
            "full model, and any first part of them is a cheaper model with the same weights."
        )
    if release.get("description"):
        lines += ["", markdown_text(release["description"], 2000)]
    lines += [
        "",
        "Everything in this card is generated from `analysis.json` and `trajectory.jsonl`; no figure is typed by hand. "
        "Intervals are 95 % bootstrap intervals over validation documents.",
    ]
    return "\n".join(lines)


def _how_to_load(records: Sequence[Record], release: Mapping[str, Any]) -> str:
    repo, step = visible(release.get("repo_id") or release["name"]).replace("`", ""), records[-1]["step"]
    revision = (release.get("revisions") or {}).get(step) or f"step-{step}"
    modes = """
A base model continues text, and expects the beginning-of-sequence token first. The tokenizer prepends it by itself;
with `add_special_tokens=False` put `tokenizer.bos_token_id` in front yourself. The ids are the same.
""" + (_modes(records[-1]) if is_pool(records[-1]) else "")
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = {json.dumps(repo)}, {json.dumps(revision)}
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0]))
```

Every released step is a revision `step-N`; `main` follows the latest. A branch can move, a 40-digit commit cannot: pin
the commit (listed in `trajectory.jsonl`) where it matters. `trust_remote_code` runs the model files of this repository,
which are the same in every revision; their sha256 are in `MANIFEST.sha256` (check with `sha256sum -c MANIFEST.sha256`).
{modes}""".rstrip()


def _modes(record: Record) -> str:
    last = stage_count(record) - 1
    calls = [
        ("generate(ids)", "all stages pooled"),
        (f"generate_prefix(ids, max_stages={min(2, last + 1)})", "the first stages only"),
        (f"generate_stage(ids, stage={last})", "one head alone"),
        ("generate_wand(ids, safety=1.0)", "exit at the first stage whose margin no later one can overturn"),
        ("generate_speculative(ids, draft_stage=0, k_draft=4)", "a shallow stage drafts, the pool verifies"),
        (f"generate_parallel_composition(ids, stages=(0, {last}))", "a pool of chosen stages"),
    ]
    width = max(len(call) for call, _ in calls)
    lines = [f"model.{call:<{width}}  # {what}" for call, what in calls]
    return "\n".join(["", "```python", *lines, "```"])


_CONFIG_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "vocab_size", "window_pattern", "rope_theta", "poe_mode", "poe_alpha",
    "poe_stage_layers", "per_stage_head",
)  # fmt: skip


def _architecture(record: Record, release: Mapping[str, Any]) -> str:
    config = release.get("config") or {}
    rows = [("parameters", count(record["model"].get("parameters")))]
    rows += [(f"`{name}`", markdown_text(config[name])) for name in _CONFIG_FIELDS if name in config]
    if not config:
        rows.append(("stage layers", markdown_text(record["model"].get("stage_layers"))))
    return "## Architecture\n\n" + markdown_table(("field", "value"), rows)


def bpb_rows(record: Record) -> list[tuple[str, Any, Any, Any]]:
    """``(path, bits per byte, interval, accuracy)`` of every path of one record, the pool first."""
    bpb, accuracy, intervals = record["bpb"], record.get("accuracy") or {}, record.get("intervals") or {}
    stage_intervals = intervals.get("stage") or []
    stage_accuracy = accuracy.get("stage") or []
    rows = [("full pool", bpb["full"], intervals.get("full"), accuracy.get("full"))]
    for stage, value in enumerate(bpb["stage"]):
        at = (items[stage] if stage < len(items) else None for items in (stage_intervals, stage_accuracy))
        rows.append((f"stage {stage} alone", value, *at))
    for index, value in enumerate(bpb.get("prefix") or []):
        if 0 < index < len(bpb["stage"]) - 1:  # the first prefix is stage 0 alone, the last the full pool
            rows.append((f"first {index + 1} stages", value, None, None))
    rows.append(("plain path", bpb.get("plain"), intervals.get("plain"), accuracy.get("plain")))
    return rows


def _measurements(record: Record) -> str:
    rows = [
        (f"**{path}**" if (path == "plain path") != is_pool(record) and path in ("full pool", "plain path") else path,
         number(bpb), interval(bounds), percent(accuracy, 2))
        for path, bpb, bounds, accuracy in bpb_rows(record)
    ]  # fmt: skip
    gap = record.get("crossover_gap") or {}
    lines = [
        f"## Measurements at step {count(record['step'])}",
        "",
        markdown_table(("path", "bits per byte", "95 % interval", "next-token accuracy"), rows),
        "",
        f"The trained path is in bold. Crossover gap (full pool minus deepest stage): {signed(gap.get('value'), 6)} "
        f"[{signed(gap.get('low'), 6)}, {signed(gap.get('high'), 6)}] bits per byte, paired over documents.",
    ]
    wand = record.get("wand") or {}
    if wand.get("exit_fraction"):
        exits = ", ".join(f"stage {stage} {percent(part)}" for stage, part in enumerate(wand["exit_fraction"]))
        lines += [
            "",
            f"WAND early exit at safety {number(wand.get('safety'), 2)} over {count(wand.get('positions'))} positions: "
            f"{exits}; the exited token equals the full pool's at {percent(wand.get('agreement'), 2)} of them.",
        ]
    return "\n".join(lines)


def _trajectory(records: Sequence[Record], release: Mapping[str, Any]) -> str:
    revisions = release.get("revisions") or {}
    stages = stage_count(records[-1])
    header = ["step", "tokens", "bits per byte", "95 % interval", "change", *(f"stage {k}" for k in range(stages))]
    header += ["accuracy"] + (["commit"] if revisions else [])
    rows = []
    for record in records:
        key, bpb = trained_path(record), record["bpb"]
        row = [count(record["step"]), count(record.get("tokens_seen")), number(bpb[key])]
        row += [interval((record.get("intervals") or {}).get(key)), _change(record)]
        row += [number(value) for value in bpb["stage"]]
        row += [percent((record.get("accuracy") or {}).get(key), 2)]
        rows.append(row + ([f"`{revisions[record['step']][:12]}`" if record["step"] in revisions else MISSING]
                           if revisions else []))  # fmt: skip
    note = "A change is a signal when its paired 95 % interval excludes zero, else noise. Stages are bits per byte."
    return f"## Trajectory\n\n{markdown_table(header, rows, 'r' * len(header))}\n\n{note}"


def _change(record: Record) -> str:
    delta = record.get("delta")
    if not delta:
        return MISSING
    return f"{signed(delta.get('full'))} ({'signal' if delta.get('signal') else 'noise'})"


def _bounds(records: Sequence[Record]) -> str:
    if not records[-1].get("wand_bounds"):
        return ""
    width = len(records[-1]["wand_bounds"])
    header = ["step", *(f"stage {k} to {k + 1}" for k in range(width)), "exit at stage 0", "agreement"]
    rows = []
    for record in records:
        wand, bounds = record.get("wand") or {}, record.get("wand_bounds") or [None] * width
        exits = wand.get("exit_fraction") or [None]
        row = [count(record["step"]), *(number(bound) for bound in bounds), percent(exits[0])]
        rows.append([*row, percent(wand.get("agreement"), 2)])
    text = (
        "99th percentile of how far one more stage can move the pooled log-probabilities, measured at this step and "
        "stored in its `config.json` (`poe_wand_p99_bounds_per_stage_head`), in nats."
    )
    return f"## WAND bounds\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


def _speculation(records: Sequence[Record]) -> str:
    measured = [record for record in records if record.get("speculative")]
    if not measured:
        return ""
    header = ("step", "acceptance", "accepted", "proposed", "rounds", "draft stage", "draft length", "prompts")
    rows = []
    for record in measured:
        it = record["speculative"]
        row = [count(record["step"]), percent(it.get("acceptance"), 2)]
        keys = ("accepted", "proposed", "rounds", "draft_stage", "draft_length", "prompts")
        rows.append(row + [count(it.get(key)) for key in keys])
    text = "Acceptance is accepted over proposed draft tokens. Greedy output equals that of `generate`."
    return f"## Self-speculative decoding\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


def _baselines(record: Record) -> str:
    baseline = record.get("baseline") or {}
    if not baseline:
        return ""
    rows = [
        ("this model", number(record["bpb"][trained_path(record)])),
        ("xz, primed with training text", number(baseline.get("xz_primed_bpb"))),
        ("xz", number(baseline.get("xz_bpb"))),
    ]
    text = "The same validation text under a general-purpose compressor."
    return f"## Baselines\n\n{text}\n\n{markdown_table(('compressor', 'bits per byte'), rows)}"


def _probes(record: Record) -> str:
    probes = record.get("probes") or []
    if not probes:
        return ""
    rows = [
        (
            markdown_text(probe.get("prompt", "")),
            markdown_text(probe.get("continuation", "")),
            markdown_text(probe.get("expected", "")),
            "yes" if probe.get("correct") else "no",
        )
        for probe in probes
    ]
    text = "Greedy continuations, as the model wrote them; markup and control characters are escaped."
    return f"## Probes\n\n{text}\n\n{markdown_table(('prompt', 'continuation', 'expected', 'correct'), rows, 'llll')}"


def _data(record: Record, release: Mapping[str, Any]) -> str:
    validation = record.get("validation") or {}
    lines = ["## Data"]
    sources = [item for item in (release.get("data") or {}).get("sources") or [] if isinstance(item, Mapping)]
    if sources:
        columns = [key for key in ("name", "documents", "bytes", "share", "license", "licence")
                   if any(item.get(key) is not None for item in sources)]  # fmt: skip
        rows = [[_cell(key, item.get(key)) for key in columns] for item in sources]
        align = "".join("r" if key in ("documents", "bytes", "share") else "l" for key in columns)
        lines += ["", markdown_table(columns, rows, align)]
    if validation:
        lines += [
            "",
            f"Validation: {count(validation.get('documents'))} documents held out whole, "
            f"{count(validation.get('bytes'))} bytes, {count(validation.get('tokens'))} tokens; slice sha256 "
            f"`{markdown_text(validation.get('sha256', MISSING), 64)}`.",
        ]
    return "\n".join(lines) if len(lines) > 1 else ""


def _cell(key: str, value: Any) -> str:
    if key == "share":
        return percent(value)
    return count(value) if isinstance(value, (int, float)) else markdown_text(MISSING if value is None else value)


def _closing(record: Record) -> str:
    versions = record.get("versions") or {}
    made = ", ".join(f"{markdown_text(name)} {markdown_text(version)}" for name, version in sorted(versions.items()))
    made = f"\n\nMeasured with {made}." if made else ""
    return f"""## Limits

A pretrained base model: it continues text and follows no instruction, repeats what its data says, true or not, and is
not fit for decisions about people.{made}

## Licence and citation

See `LICENSE`. If you use this release, please cite the companion paper:

{_CITATION}"""
