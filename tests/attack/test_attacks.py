"""A few seconds of every attack, with a fixed seed; `scripts/attack.py` runs as many as one wants."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from attacks.disturbances import Tally, attack_with_another, attack_with_fault, attack_with_kill
from attacks.doors import Door, DoorAttack
from attacks.files import TARGETS, FileAttack
from attacks.options import OptionAttack
from attacks.site import Site, build_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def file_attack(site: Site) -> FileAttack:
    return FileAttack(site)


@pytest.fixture(scope="module")
def door_attack(site: Site) -> DoorAttack:
    return DoorAttack(site)


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_refused_in_a_sentence(file_attack: FileAttack, target: str) -> None:
    tally, rng = Tally(), random.Random(f"files {target}")
    for _ in range(4):
        file_attack(target, rng, tally)
    assert not tally.failures


def test_hostile_bytes_at_the_doors_end_in_a_sentence(door_attack: DoorAttack) -> None:
    tally, rng, doors = Tally(), random.Random("doors"), list(door_attack.doors)
    for number in range(2000):
        door_attack(doors[number % len(doors)], rng, tally)
    assert not tally.failures
    assert tally.seen["accepted"] > 100 and tally.seen["refused"] > 1000


def test_a_reader_that_leaves_its_folder_is_seen(site: Site, door_attack: DoorAttack) -> None:
    tally = Tally()
    door_attack.attack(Door("x", b"", lambda folder: (folder / ".." / "secret").read_text()), b"", tally)
    assert len(tally.failures) == 1 and f"{site.root / 'secret'}" in tally.failures[0]


@pytest.mark.parametrize("merge", ["full", "sparse", "adapters"])
def test_faults_of_the_system_never_end_in_wrong_bits(site: Site, merge: str) -> None:
    tally, rng = Tally(), random.Random(f"faults {merge}")
    for _ in range(12):
        attack_with_fault(site, merge, rng, tally)
    assert not tally.failures
    assert tally.seen["never happened"] <= 3  # the order of calls depends on threads, their number hardly does


@pytest.mark.parametrize("merge", ["full", "adapters"])
def test_merges_killed_at_any_moment_are_resumed_to_the_same_bits(site: Site, merge: str) -> None:
    tally, rng = Tally(), random.Random(f"kills {merge}")
    for _ in range(5):
        attack_with_kill(site, merge, rng, 0.1, tally)
    assert not tally.failures


def test_of_two_merges_in_a_folder_one_is_refused(site: Site) -> None:
    tally, rng = Tally(), random.Random("two merges")
    for _ in range(5):
        attack_with_another(site, rng, 0.05, tally)
    assert not tally.failures


def test_what_a_plan_accepts_is_merged_and_can_be_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    tally, rng, attack = Tally(), random.Random("options"), OptionAttack(tmp_path)
    for _ in range(40):
        attack(rng, tally)
    assert not tally.failures
    assert tally.seen["merged"] > 10 and tally.seen["fitted"] > 3 and tally.seen["refused"] > 10
