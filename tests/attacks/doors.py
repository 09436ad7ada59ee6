"""
Hostile bytes at the readers of files, in one process: thousands a second, where a command takes tens of milliseconds.

What a reader refuses in a sentence, a command tells; any other exception it calls "not expected".
"""

from __future__ import annotations

import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attacks import children
from attacks.disturbances import Tally
from attacks.mutations import damaged, flipped
from attacks.site import Site
from attacks.watch import watch_opens
from hf_frmerge.checkpoints.adapters.config import read_adapter_config
from hf_frmerge.checkpoints.gguf.header import read_gguf_header
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.modules_file import parse_modules
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.header import read_header
from hf_frmerge.checkpoints.tensors.shard_index import weight_map
from hf_frmerge.checkpoints.tensors.small_files import read_config
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import read_tokenizer
from hf_frmerge.errors import MergeError
from hf_frmerge.hub.card.licences import read_source_metadata
from hf_frmerge.merging.arguments import config_file
from hf_frmerge.merging.engine.journal import Journal
from hf_frmerge.merging.planning.coefficient_table import read_coefficients
from hf_frmerge.merging.record.manifest import local_sources, read_manifest

SLOW = 1.0
"""Seconds of CPU time that no file may cost."""


@dataclass(frozen=True)
class Door:
    """A file in the folder `doors` of a site, an intact one, and what reads it."""

    name: str
    intact: bytes
    read: Callable[[Path], object]


def doors_of(site: Site) -> dict[str, Door]:
    """Return the readers of files of others, each with an intact file."""
    merge = site.root / "wanted-full"
    model, adapter = site.root / "in" / "a", site.root / "in" / "x"
    manifest = read_manifest(merge)
    modules = b'[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]'
    options = b'{"experts": ["a", "b"], "output_dir": "out", "weights": [1, 2]}'
    journal = site.root / "doors-journal"
    journal.mkdir()
    kept = Journal(journal, 0, {"option": [1, "x"]}, {}, resume=False)
    kept.start()
    kept.record_written("tensor", "0" * 32, {"0": "1" * 32}, None, 0)
    kept.close()

    def header(folder: Path) -> object:
        return read_header(LocalFolder(str(folder)), "model.safetensors", "spec")

    return {
        "header": Door("model.safetensors", (model / "model.safetensors").read_bytes()[:2000], header),
        "whole header": Door("model.safetensors", (model / "model.safetensors").read_bytes(), header),
        "JSON": Door("config.json", (model / "config.json").read_bytes(), _parse),
        "config": Door(
            "config.json", (model / "config.json").read_bytes(), lambda f: read_config(LocalFolder(str(f)), "spec")
        ),
        "GGUF header": Door(
            "model.gguf", gguf_file(), lambda f: read_gguf_header(LocalFolder(str(f)), "model.gguf", "spec")
        ),
        "index": Door(
            "model.safetensors.index.json",
            (merge / "model.safetensors.index.json").read_bytes(),
            lambda f: weight_map(LocalFolder(str(f)), "spec"),
        ),
        "tokenizer": Door(
            "tokenizer.json",
            (model / "tokenizer.json").read_bytes(),
            lambda f: read_tokenizer(Source("spec", "full", str(f))),
        ),
        "adapter config": Door(
            "adapter_config.json",
            (adapter / "adapter_config.json").read_bytes(),
            lambda f: read_adapter_config(LocalFolder(str(f)), "spec"),
        ),
        "modules": Door("modules.json", modules, lambda f: parse_modules((f / "modules.json").read_bytes(), "spec")),
        "card": Door("README.md", (model / "README.md").read_bytes(), read_source_metadata),
        "manifest": Door("merge_manifest.json", (merge / "merge_manifest.json").read_bytes(), read_manifest),
        "sources": Door(
            ".frmerge_sources.json",
            (merge / ".frmerge_sources.json").read_bytes(),
            lambda f: local_sources(f, manifest),
        ),
        "coefficients": Door(
            "merge_coefficients.safetensors",
            (merge / "merge_coefficients.safetensors").read_bytes(),
            lambda f: read_coefficients(f / "merge_coefficients.safetensors"),
        ),
        "options": Door("options.json", options, lambda f: config_file.read_config(f / "options.json")),
        "journal": Door(
            "journal-0.jsonl",
            (journal / "journal-0.jsonl").read_bytes(),
            lambda f: Journal(f, 0, {"option": [1, "x"]}, {}, resume=True),
        ),
    }


def gguf_file() -> bytes:
    """Return a small GGUF file with settings of every kind, and a tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    settings = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("llama.rope.freq_base") + struct.pack("<If", 6, 10_000.0),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 0.25),
    ]
    tensor = text("output_norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(settings)) + b"".join(settings) + tensor
    return head + b"\0" * (-len(head) % 32 + 32)


class DoorAttack:
    """Gives damaged files to readers."""

    def __init__(self, site: Site) -> None:
        children.import_torch()
        self.doors = doors_of(site)
        self._folder = site.root / "doors"
        self._reads = False
        self._outside: list[str] = []
        watch_opens([self._folder], lambda path: self._outside.append(path) if self._reads else None)

    def __call__(self, name: str, rng: random.Random, tally: Tally) -> None:
        """Damage an intact file and have it read."""
        door = self.doors[name]
        self.attack(door, (flipped if name == "journal" else damaged)(door.intact, rng), tally)

    def attack(self, door: Door, content: bytes, tally: Tally) -> None:
        """Have a file read."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        (self._folder / door.name).write_bytes(content)
        started, troubles = time.thread_time(), []
        self._reads = True
        try:
            door.read(self._folder)
            tally.seen["accepted"] += 1
        except (MergeError, OSError):
            tally.seen["refused"] += 1
        except Exception as error:
            troubles.append(f"{type(error).__name__}: {error}; the file begins {content[:200]!r}")
        finally:
            self._reads = False
        if self._outside:
            troubles.append(f"opened {self._outside}; the file begins {content[:200]!r}")
            self._outside.clear()
        if time.thread_time() - started > SLOW:
            troubles.append(f"{time.thread_time() - started:.1f} s of CPU time; the file begins {content[:200]!r}")
        tally.add(door.name, troubles)


def _parse(folder: Path) -> object:
    try:
        return parse_json((folder / "config.json").read_bytes())
    except ValueError as error:  # which whoever parses JSON turns into a sentence
        raise MergeError(str(error)) from error
