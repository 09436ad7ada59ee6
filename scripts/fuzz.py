"""
Fuzz the readers of files of others, guided by coverage, with atheris (`pip install atheris`).

    python scripts/fuzz.py -max_total_time=600

All options are those of libFuzzer. The first byte of an input chooses the reader, the rest is the file; what a reader
answers in another way than by a sentence, or only after a second, ends the run and is kept.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported
os.environ["OMP_NUM_THREADS"] = "1"

with atheris.instrument_imports(include=["hf_frmerge"]):
    from attacks.disturbances import Tally
    from attacks.doors import DoorAttack
    from attacks.site import build_site


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="frmerge-fuzz-"))
    logging.getLogger("hf_frmerge").setLevel(logging.ERROR)  # thousands of notes otherwise
    attack = DoorAttack(build_site(root))
    names = list(attack.doors)
    corpus = root / "corpus"
    corpus.mkdir()
    for number, name in enumerate(names):
        (corpus / str(number)).write_bytes(bytes([number]) + attack.doors[name].intact)

    def read(data: bytes) -> None:
        tally = Tally()
        attack.attack(attack.doors[names[data[0] % len(names)] if data else names[0]], data[1:], tally)
        if tally.failures:
            raise AssertionError(tally.failures[0])

    atheris.Setup([*sys.argv, "-max_len=4096", f"-artifact_prefix={root}/", str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
