"""The model card: Markdown rendered from analysis records and the release description alone.

No figure is typed by hand: rendering the same records gives the same text to the byte, so drift between a card and its
records is a failed comparison. Text that a model wrote is escaped (``text.markdown_text``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError
from cognica_poe.release.card import series, tables, training
from cognica_poe.release.card.capabilities import capabilities
from cognica_poe.release.card.exits import exits
from cognica_poe.release.card.findings import findings
from cognica_poe.release.card.gap import gap_section
from cognica_poe.release.card.readings import Record
from cognica_poe.release.card.related import related
from cognica_poe.release.card.tables import is_pool, stage_count
from cognica_poe.release.text import MISSING, count, markdown_code, markdown_table, markdown_text, percent, visible
from cognica_poe.release.trajectory import NO_RECORD, Trajectory

_CHINCHILLA = 20.0  # tokens per parameter
_CITATION = """```bibtex
@misc{jeong2026poe,
  author    = {Jeong, Jaepil},
  title     = {Product of Experts as Scalable Local Learning: Modular Construction at 1.3B Parameters},
  year      = {2026},
  doi       = {10.5281/zenodo.19547653},
  publisher = {Zenodo},
}
```"""


def render_card(records: Sequence[Record], release: Mapping[str, Any], sums: Mapping[int, Sums] | None = None) -> str:
    """Markdown of the card (front matter, tables, usage).

    ``records``: analysis records (JSON layout of ``AnalysisRecord``), any order, one per step; the highest step is the
    one the card describes. ``release``: ``name``, ``repo_id`` and, where known, ``license``, ``languages``,
    ``description``, ``config`` (the model's config.json), ``data`` (the data manifest) and ``revisions``
    (``{step: commit sha}``; a step there without a record is a row that says so). ``sums``: of the records, by step,
    for changes between them. Raises UserError when there is no record, or two of one step.
    """
    if not records:
        raise UserError("no analysis record to make a card from: run `cognica-poe analyze` first")
    records = sorted(records, key=lambda record: record["step"])
    steps = [record["step"] for record in records]
    if len(set(steps)) != len(steps):
        raise UserError(f"two analysis records of one step among {steps}: a card takes one record per step")
    latest = records[-1]
    trajectory = Trajectory.of(records, sums or {}, dict.fromkeys(release.get("revisions") or {}, NO_RECORD))
    sections = [
        _front_matter(latest, release),
        _introduction(latest, release, len(records) == 1),
        _how_to_load(records, release),
        _architecture(latest, release),
        training.stage_layout(latest),
        training.parameter_groups(release),
        training.training_table(release),
        _data(latest, release),
        training.checkpoints(release),
        training.loss_history(release),
        tables.measurements(latest),
        gap_section(release),
        *(section.markdown() for section in series.sections(trajectory, release)),
        _findings(trajectory),
        exits(release),
        tables.baselines(latest),
        capabilities(records),
        tables.probes(latest),
        _limits(latest),
        related(str((release.get("training") or {}).get("recipe", ""))),
        _closing(release),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(record: Record, release: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    tags = ["causal-lm", "pretraining", "nanochat"]
    if is_pool(record):
        tags += ["product-of-experts", "per-stage-head", "local-learning", "early-exit", "speculative-decoding"]
    if len(set(record["model"].get("stage_layers") or [])) > 1:
        tags.append("asymmetric-stages")
    if ((release.get("training") or {}).get("tokens_per_parameter") or 0.0) >= _CHINCHILLA:
        tags.append("chinchilla")
    data = ModelCardData(
        license=release.get("license", "apache-2.0"),
        language=release.get("languages") or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(record: Record, release: Mapping[str, Any], alone: bool) -> str:
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
    sources = "`analysis.json`, `release.json`, `config.json` and `trajectory.jsonl`"
    sources += " of this revision" if alone else " of every revision"
    lines += [
        "",
        f"Everything in this card is generated from {sources}; no figure is typed by hand. "
        "Intervals are 95 % bootstrap intervals over validation documents (pieces of them where there are few).",
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
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0]))
```

Every released step is a revision `step-N`; `main` follows the latest. A branch can move, a 40-digit commit cannot: pin
the commit (listed in `trajectory.jsonl` of `main`) where it matters. `trust_remote_code` runs the model files of this
repository, which are the same in every revision; their sha256 are in `MANIFEST.sha256` (check with
`sha256sum -c MANIFEST.sha256`).
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
    "max_position_embeddings", "vocab_size", "window_pattern", "short_window", "rope_theta", "hidden_act",
    "rms_norm_eps", "tie_word_embeddings", "poe_mode", "poe_alpha", "poe_stage_layers", "per_stage_head",
    "stage_head_rank", "poe_head_count", "poe_exit_layers", "poe_wand_p99_bounds_per_stage_head",
)  # fmt: skip


def _architecture(record: Record, release: Mapping[str, Any]) -> str:
    config = release.get("config") or {}
    rows = [("parameters", count(record["model"].get("parameters")))]
    shown = [name for name in _CONFIG_FIELDS if name in config and config[name] != []]
    rows += [(f"`{name}`", markdown_code(config[name])) for name in shown]
    if not config:
        rows.append(("stage layers", markdown_code(record["model"].get("stage_layers"))))
    return "## Architecture\n\n" + markdown_table(("field", "value"), rows, "ll")


_SOURCE_FIELDS = {  # of ``tables.source_rows``, and whether the column is text
    "name": True, "dataset": True, "revision": True, "languages": True, "licence": True, "training_documents": False,
    "training_bytes": False, "validation_documents": False, "validation_bytes": False, "share_wanted": False,
    "share_reached": False,
}  # fmt: skip


def _data(record: Record, release: Mapping[str, Any]) -> str:
    validation = record.get("validation") or {}
    lines = ["## Data"]
    sources = tables.source_rows(release.get("data") or {})
    if sources:
        columns = [key for key in _SOURCE_FIELDS if any(item.get(key) is not None for item in sources)]
        rows = [[_cell(key, item.get(key)) for key in columns] for item in sources]
        align = "".join("l" if _SOURCE_FIELDS[key] else "r" for key in columns)
        lines += ["", markdown_table([key.replace("_", " ") for key in columns], rows, align)]
    if validation:
        lines += [
            "",
            f"Validation: {tables.validation_text(validation)}, {count(validation.get('bytes'))} bytes, "
            f"{count(validation.get('tokens'))} tokens; slice sha256 "
            f"{markdown_code(validation.get('sha256', MISSING), 64)}.",
        ]
    return "\n".join(lines) if len(lines) > 1 else ""


def _cell(key: str, value: Any) -> str:
    if key.startswith("share"):
        return percent(value)
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return count(value) if isinstance(value, (int, float)) else markdown_text(MISSING if value is None else value)


def _findings(trajectory: Trajectory) -> str:
    told = findings(trajectory)
    if not told:
        return ""
    text = (
        "Made from the labelled changes of the tables above, with their paired 95 % intervals; what a table calls "
        "noise is named, not told."
    )
    return "## Findings by checkpoint\n\n" + "\n".join([text, "", *(f"- {found.text}" for found in told)])


def _limits(record: Record) -> str:
    versions = record.get("versions") or {}
    made = ", ".join(f"{markdown_text(name)} {markdown_text(version)}" for name, version in sorted(versions.items()))
    made = f"\n\nMeasured with {made}." if made else ""
    return f"""## Limits

A pretrained base model: it continues text and follows no instruction, repeats what its data says, true or not, and is
not fit for decisions about people. Its figures stand for one training, with one seed, and for the text named above;
the probes are an anecdote.{made}"""


def _closing(release: Mapping[str, Any]) -> str:
    licence = markdown_text(release.get("license", "apache-2.0"))
    return f"""## Licence and citation

{licence}: see `LICENSE` and `NOTICE`. If you use this release, please cite the companion paper:

{_CITATION}"""
