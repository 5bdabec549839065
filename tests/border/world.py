"""A world for command lines to go wrong in: a finished run, texts, and paths of every unfit kind."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cognica_poe.data.mixes import save_mix
from cognica_poe.recipe.stored import save_recipe
from tests.border.forks import Forks, Line
from tests.data.corpora import pair_of_datasets, pair_of_sources, write_mirror
from tests.runs import small_recipe, write_texts


@contextlib.contextmanager
def make_world(forks: Forks) -> Iterator[dict[str, str]]:
    """Names of paths in a new folder that other users may read; ``base`` is the folder that is watched."""
    top = Path(tempfile.mkdtemp(prefix="mistakes-"))
    try:
        top.chmod(0o755)
        base = top / "base"
        for name in ("cwd", "tmp", "home", "empty", "foreign", "locked"):
            (base / name).mkdir(parents=True)
        for folder in (base, base / "tmp", base / "home"):
            folder.chmod(0o777)  # nobody can write here, and read nothing in locked
        texts = write_texts(base / "texts")
        recipe = small_recipe(texts, steps=4, checkpoint_every=2)
        recipe = replace(recipe, release=replace(recipe.release, every=2))
        save_recipe(recipe, base / "recipe.json")
        (base / "foreign" / "thesis.docx").write_text("years of work")
        (base / "file").write_bytes(b"\x00\x01\xff" * 100)
        (base / "loop").symlink_to("loop")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        names = ("recipe.json", "run", "texts", "empty", "foreign", "locked", "file", "loop", "cwd")
        world = {name.removesuffix(".json"): str(base / name) for name in names}
        world |= {"base": str(base), "new": str(base / "new"), "port": port, "top": str(top)}
        world["release"] = str(base / "run" / "release" / "step-4")
        done = forks.run(Line(["run", world["recipe"], "--out", world["run"]], world["cwd"], places(world), 300))
        assert done.code == 0, done.err
        world["planned"] = str(base / "planned")
        pack = (
            f"data pack {world['run']}/data --tokenizer {world['run']}/tokenizer --out {world['planned']} --row-len 65"
        )
        done = forks.run(Line([*pack.split(), "--plan"], world["cwd"], places(world), 60))
        assert done.code == 0, done.err
        mix = pair_of_sources(revision=None)
        save_mix(
            replace(mix, sources=tuple(replace(source, revision=None) for source in mix.sources)),
            base / "unpinned.json",
        )
        write_mirror(base / "mirror", pair_of_datasets(9))
        world["mix"] = str(base / "unpinned.json")
        (base / "locked").chmod(0o700)
        yield world
    finally:
        shutil.rmtree(top, ignore_errors=True)


def places(world: dict[str, str]) -> dict[str, str]:
    """Environment whose own folders lie in the world, so that leftovers are seen, and a mirror of datasets there."""
    base = world["base"]
    return {"TMPDIR": f"{base}/tmp", "HOME": f"{base}/home", "HF_ENDPOINT": f"file:{base}/mirror"}


def state_of(folder: str) -> dict[str, tuple]:
    """Every path below ``folder`` with kind, mode, time and digest."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(where, name)
            about = os.lstat(path)
            content = ""
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            when = about.st_mtime_ns if name in files else 0  # a lock may come and go
            found[os.path.relpath(path, folder)] = (about.st_mode, when, about.st_size, content)
    return found
