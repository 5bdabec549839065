"""Measurements of the data engine: python -m benchmarks.data NAME --text FOLDER --work FOLDER.

pipeline: build, tokenizer and pack of a folder, by 1, 2 and 4 workers: seconds, processor seconds, memory, digests
stages:   processor seconds of every stage of a build
kills:    the same build ended by SIGKILL at random moments until it is done
shards:   a build into 3,000 shards with at most 256 open files
keys:     a build of two million short documents
waiting:  three epochs of training on a small corpus: share of the time that steps waited for their rows
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.data import building, waiting

MEASURES = {
    "pipeline": building.pipeline,
    "stages": building.stages,
    "kills": building.kills,
    "shards": building.shards,
    "keys": building.keys,
    "waiting": waiting.waiting,
}


def main() -> None:
    """Run one measurement; its figures go to stdout as JSON and, with ``--results``, into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--text", type=Path, required=True, help="folder of texts")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--results", type=Path, help="folder for the figures, NAME.json")
    options = parser.parse_args()
    figures = {"measure": options.measure, **MEASURES[options.measure](options.text, options.work)}
    text = json.dumps(figures, indent=1)
    print(text)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{options.measure}.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
