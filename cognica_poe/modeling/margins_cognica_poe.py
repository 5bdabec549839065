"""Where a token may leave early: the margin between its first two scores that each stage and each exit asks for.

Three sources: WAND's bounds, added up over the transitions that remain; margins calibrated for a stated agreement with
the full pool (``poe_agreement_margins`` of the configuration); and margins of the caller's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from .configuration_cognica_poe import CognicaPoEConfig, check


def leaving_margins(
    config: CognicaPoEConfig,
    fallback: Sequence[float],
    safety: float,
    p99_bounds: Sequence[float] | None,
    exit_bounds: Sequence[float] | None,
    guarantee: float | None,
    margins: Sequence[float] | None,
) -> tuple[list[float], list[float]]:
    """Margins behind every stage but the last, ``[K - 1]``, and behind every exit, none to pass by the exits.

    ``fallback``: bounds for a configuration without its own, where their number fits. The others are those of
    ``generate_wand``. Raises ValueError for bounds and margins that do not fit, and for two answers to one question.
    """
    if guarantee is None and margins is None:
        bounds, exits = wand_bounds(config, fallback, safety, p99_bounds), _exit_bounds(config, exit_bounds)
        return _add_up(config, bounds, exits, safety)
    name = "guarantee" if margins is None else "margins"
    given = {"p99_bounds": p99_bounds, "exit_bounds": exit_bounds, "safety": None if safety == 1.0 else safety}
    given |= {} if margins is None else {"guarantee": guarantee}
    others = [other for other, value in given.items() if value is not None]
    check(not others, f"{name} says where tokens leave: leave {', '.join(others)} out")
    if margins is None:
        assert guarantee is not None
        return _stated(config, guarantee), []
    return _fitting(config, margins, "margins"), []


def held_margins(config: CognicaPoEConfig) -> dict[str, list[float]]:
    """The margins of a configuration by name: ``direct``, and every agreement."""
    direct = config.poe_direct_p99_bounds
    return {**({} if direct is None else {"direct": direct}), **(config.poe_agreement_margins or {})}


def wand_bounds(
    config: CognicaPoEConfig, fallback: Sequence[float], safety: float, bounds: Sequence[float] | None
) -> list[float]:
    """What each transition between pools may move, ``[K - 1]`` nats: as given, the configuration's, or the fallback."""
    K = config.num_stages
    bounds = config.poe_wand_p99_bounds_per_stage_head if bounds is None else bounds
    if bounds is None:
        how = f"pass p99_bounds with {K - 1} values, or calibrate the model so that its config has "
        bounds = fallback if K > 1 else ()
        fits = len(bounds) == K - 1
        check(fits, f"no WAND bounds for {K} stages: {how}poe_wand_p99_bounds_per_stage_head")
    bounds = [float(bound) for bound in bounds]
    fits = len(bounds) == K - 1 and all(bound >= 0 for bound in bounds)
    check(fits, f"p99_bounds {bounds} need {K - 1} non-negative values, one per transition between stages")
    check(safety >= 0, f"safety is {safety}; it must not be negative")
    return bounds


def _exit_bounds(config: CognicaPoEConfig, bounds: Sequence[float] | None) -> list[float]:
    exits = config.poe_exit_layers
    held = config.poe_wand_p99_bounds_per_exit if bounds is None else bounds
    bounds = [float(bound) for bound in held or ()]
    fits = not bounds or (len(bounds) == len(exits) and all(bound >= 0 for bound in bounds))
    check(fits, f"exit_bounds {bounds} need {len(exits)} non-negative values, one per exit, or none at all")
    return bounds


def _add_up(
    config: CognicaPoEConfig, bounds: list[float], exits: list[float], safety: float
) -> tuple[list[float], list[float]]:
    """All that may still move behind a stage or an exit, times ``safety``."""
    ends = config.stage_segments
    margins = [safety * sum(bounds[stage:]) for stage in range(len(bounds))]
    of_exits = []
    for layer, bound in zip(config.poe_exit_layers if exits else (), exits, strict=True):
        stage = sum(end < config.poe_cuts.index(layer) for end in ends)
        of_exits.append(safety * sum([bound, *bounds[stage:]]))
    return margins, of_exits


def _stated(config: CognicaPoEConfig, guarantee: float) -> list[float]:
    held = config.poe_agreement_margins or {}
    known = f"margins are calibrated for {', '.join(held)}" if held else "the config has no poe_agreement_margins"
    margins = next((values for name, values in held.items() if float(name) == guarantee), None)
    check(margins is not None, f"guarantee {guarantee}: {known}")
    assert margins is not None
    return _fitting(config, margins, f"poe_agreement_margins {guarantee}")


def _fitting(config: CognicaPoEConfig, margins: Sequence[float], name: str) -> list[float]:
    margins, K = [float(margin) for margin in margins], config.num_stages
    fits = len(margins) == K - 1 and all(margin >= 0 for margin in margins)
    check(fits, f"{name} {margins} need {K - 1} non-negative values, one per stage but the last")
    return margins
