"""
Attack the commands with damaged files, failing calls to the system, kills, concurrent merges and random options, and
print what held.

    python scripts/attack.py --doors 1000000 --files 10000 --faults 1000 --kills 200 --pairs 100 --options 500 --seed 0

Everything happens in a temporary folder; the attacks themselves, and what counts as a failure, are in `tests/attacks`.
Some of what failed is kept there, and the folder with it. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported
os.environ["OMP_NUM_THREADS"] = "1"

from attacks.disturbances import Tally, attack_with_another, attack_with_fault, attack_with_kill
from attacks.doors import DoorAttack
from attacks.files import TARGETS, FileAttack
from attacks.site import build_site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doors", type=int, default=20_000, help="damaged files given to readers in one process")
    parser.add_argument("--files", type=int, default=1000, help="damaged files")
    parser.add_argument("--faults", type=int, default=200, help="calls to the system that fail")
    parser.add_argument("--kills", type=int, default=50, help="merges killed")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of merges into one folder")
    parser.add_argument("--options", type=int, default=50, help="sets of options, planned, merged and verified")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds for each kind of attack")
    parser.add_argument("--seed", type=int, default=0, help="seed of all choices")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="frmerge-attack-"))
    site = build_site(root)
    logging.getLogger("hf_frmerge").setLevel(logging.ERROR)  # thousands of notes otherwise
    names, targets = list(site.merges), list(TARGETS)
    file_attack, door_attack = cache(lambda: FileAttack(site)), cache(lambda: DoorAttack(site))
    os.environ["HF_FRMERGE_CACHE"] = str(root / "cache")

    @cache
    def option_attack() -> Callable[[random.Random, Tally], None]:
        from attacks.options import OptionAttack  # imports torch

        return OptionAttack(root / "options")

    def damage_file(number: int, tally: Tally) -> None:
        file_attack()(targets[number % len(targets)], rng, tally)

    def open_door(number: int, tally: Tally) -> None:
        attack = door_attack()
        doors = list(attack.doors)
        attack(doors[number % len(doors)], rng, tally)

    # What forks comes first: the others import torch into this process, or watch every file that it opens.
    attacks: list[tuple[str, int, Callable[[int, Tally], None]]] = [
        (
            "faults",
            options.faults,
            lambda number, tally: attack_with_fault(site, names[number % len(names)], rng, tally),
        ),
        (
            "kills",
            options.kills,
            lambda number, tally: attack_with_kill(site, names[number % len(names)], rng, 0.1, tally),
        ),
        ("pairs of merges", options.pairs, lambda _, tally: attack_with_another(site, rng, 0.2, tally)),
        ("damaged files", options.files, damage_file),
        ("hostile bytes", options.doors, open_door),
        ("random options", options.options, lambda _, tally: option_attack()(rng, tally)),
    ]
    print(f"{'attack':16} {'tried':>7} {'held':>7} {'failed':>7}  seen")
    failures = []
    for kind, number, attack in attacks:
        tally, end = Tally(), time.monotonic() + options.seconds
        for index in range(number):
            if time.monotonic() > end:
                break
            rng.seed(f"{options.seed} {kind} {index}")  # what it draws does not hang on what others were given
            attack(index, tally)
        seen = ", ".join(f"{count} {what}" for what, count in tally.seen.most_common())
        print(f"{kind:16} {tally.tried:7} {tally.held:7} {tally.tried - tally.held:7}  {seen}", flush=True)
        failures += tally.failures
    for failure in failures[:50]:
        print(failure)
    if not failures:
        shutil.rmtree(root)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
