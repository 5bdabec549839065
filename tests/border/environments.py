"""Right command lines in wrong environments."""

from collections.abc import Iterator

from tests.border.forks import Line
from tests.border.mistakes import RIGHT, Mistake, right_words, without

ENVIRONMENTS = {
    "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
    "WORLD_SIZE and RANK": {"WORLD_SIZE": "2", "RANK": "1"},
    "no MASTER_PORT": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
    "MASTER_PORT no number": {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "x",
    },
    "MASTER_PORT too high": {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "99999",
    },
    "WORLD_SIZE no number": {"WORLD_SIZE": "two", "RANK": "0"},
    "WORLD_SIZE zero": {
        "WORLD_SIZE": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    },
    "WORLD_SIZE empty": {"WORLD_SIZE": ""},
    "WORLD_SIZE negative": {"WORLD_SIZE": "-2"},
    "RANK beyond WORLD_SIZE": {
        "WORLD_SIZE": "2",
        "RANK": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    },
    "RANK negative": {
        "WORLD_SIZE": "2",
        "RANK": "-1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    },
    "LOCAL_RANK no number": {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "x",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    },
}
"""Environments in which no process can find its companions, by name."""


def environment_mistakes(world: dict[str, str]) -> Iterator[Mistake]:
    """Right lines in wrong environments."""
    for command in ("run", "train"):
        for kind, env in ENVIRONMENTS.items():
            line = Line(right_words(RIGHT[command], world), world["cwd"], env)
            yield Mistake(command, f"environment: {kind}", line, (*env, "torchrun"))
    words = right_words(RIGHT["publish"], world)
    for kind, env in {
        "no token": {"HF_TOKEN": None, "HF_HUB_OFFLINE": None},
        "offline": {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"},
    }.items():
        line = Line([*without(words, "--to"), "--to", "test/small"], world["cwd"], env)
        yield Mistake("publish", f"environment: {kind}", line, ("HF_TOKEN", "Hub", "offline", "test/small"))
