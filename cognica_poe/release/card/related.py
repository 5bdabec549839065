"""Models of the same family that the card names: recipes of this package, and how their stages are laid out."""

from __future__ import annotations

from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.release.text import count, markdown_code, markdown_table, markdown_text

_PUBLISHED = {
    "1.3b": "cognica/Cognica-PoE-v1.0-1.3B-base",
    "1.3b-bp": "cognica/Cognica-BP-v1.0-1.3B-base",
    "1.5b": "cognica/Cognica-PoE-v1.0-1.5B-base",
    "3b": "cognica/Cognica-PoE-v1.0-3B-base",
}
"""Where a shape was published by its authors."""


def layout(recipe: Recipe) -> str:
    """``16, 6, 5, 5`` or ``one path``; plain text."""
    return "one path" if recipe.model.poe_mode == "none" else ", ".join(map(str, recipe.model.poe_stage_layers))


def heads(recipe: Recipe) -> str:
    """Whether stages have heads of their own; plain text."""
    if recipe.model.poe_mode == "none" or not recipe.model.per_stage_head:
        return "shared"
    return f"shared and own, rank {recipe.model.stage_head_rank}" if recipe.model.stage_head_rank else "shared and own"


def related(name: str = "") -> str:
    """Section of the card: recipes without ``name`` itself."""
    rows = []
    for recipe in RECIPES.values():
        if recipe.name == name:
            continue
        model = recipe.model
        shape = f"{model.num_hidden_layers} x {count(model.hidden_size)}"
        published = markdown_code(_PUBLISHED[recipe.name]) if recipe.name in _PUBLISHED else ""
        rows.append([markdown_code(recipe.name), shape, markdown_text(layout(recipe)), heads(recipe),
                     count(model.vocab_size), published])  # fmt: skip
    text = (
        "Recipes of the same code; the shapes of published models name them. `cognica-poe params NAME` counts their "
        "parameters, `NAME-bp` is ordinary backprop at the same shape."
    )
    header = ("recipe", "layers x width", "layers by stage", "heads", "vocabulary", "published as")
    return f"## Related models\n\n{text}\n\n" + markdown_table(header, rows, "lrllrl")
