"""The card's table of exits that were trained on the frozen weights of a release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cognica_poe.release.text import count, markdown_table, number, percent


def exits(release: Mapping[str, Any]) -> str:
    """Markdown of the section, empty where there are none."""
    added = release.get("exits") or []
    if not added:
        return ""
    rows = [
        (
            count(exit.get("layer")),
            count(exit["rank"]) if exit.get("rank") else "full",
            count(exit.get("tokens")),
            count(exit.get("seed")),
            number(exit.get("nats")),
            number(exit.get("pool_nats")),
            percent(exit.get("agreement")),
            percent(exit.get("acceptance")),
            number(exit.get("bound")),
        )
        for exit in added
    ]
    columns = ("layers before", "head", "tokens", "seed", "nats", "pool's", "agrees", "accepted", "p99 bound")
    return (
        "## Exits\n\nHeads inside stages, trained on the frozen weights and no experts of the pool: "
        "`generate_exit(ids, layer)`, `generate_speculative(ids, draft_layer=layer)`. Measured on text held out of "
        "their training: mean nats per token, agreement with the pool's most probable token, accepted greedy drafts "
        f"(k = {count(added[0].get('k_draft'))}).\n\n" + markdown_table(columns, rows)
    )
