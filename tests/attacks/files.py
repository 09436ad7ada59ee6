"""Files that somebody damaged: every command must refuse them in a sentence, or do what it does."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from attacks import children
from attacks.disturbances import Tally
from attacks.mutations import damaged
from attacks.site import Site, empty, files_below
from attacks.watch import watch_opens

SLOW = 1.0
"""Seconds of CPU time, above those of an intact file, that no file may cost."""


@dataclass(frozen=True)
class Target:
    """A file to damage, below the root of a site, and the commands that read it; `OUT` stands for a new folder."""

    path: str
    commands: tuple[tuple[str, ...], ...]


_MERGE = ("merge", "work/a", "work/b", "--output-dir", "OUT")
_PLAN = ("plan", "work/a", "work/b", "--output-dir", "OUT")
_ADAPTERS = ("merge", "work/x", "work/y", "--output-dir", "OUT")
_INTO_BASE = (*_ADAPTERS, "--base-model", "work/base", "--adapter-output", "merged")
_RECORD = (("verify", "work/full"), ("card", "work/full"), ("diff", "work/full", "work/sparse"))

TARGETS = {
    "header": Target("work/a/model.safetensors", (_MERGE, _PLAN)),
    "index": Target(
        "work/full/model.safetensors.index.json",
        (("plan", "work/full", "work/b", "--output-dir", "OUT"), *_RECORD[:1]),
    ),
    "config": Target("work/a/config.json", (_MERGE, (*_PLAN, "--block", "head"))),
    "tokenizer": Target("work/a/tokenizer.json", (_MERGE,)),
    "tokenizer config": Target("work/b/tokenizer_config.json", (_MERGE,)),
    "generation config": Target("work/b/generation_config.json", (_MERGE,)),
    "card": Target("work/a/README.md", (_MERGE, _PLAN)),
    "adapter config": Target("work/x/adapter_config.json", (_ADAPTERS, _INTO_BASE)),
    "adapter": Target("work/x/adapter_model.safetensors", (_ADAPTERS, _INTO_BASE)),
    "manifest": Target("work/full/merge_manifest.json", (*_RECORD, ("verify", "work/full", "--sha256"))),
    "manifest of a sparse merge": Target("work/sparse/merge_manifest.json", (("verify", "work/sparse"), *_RECORD[2:])),
    "manifest of adapters": Target("work/adapters/merge_manifest.json", (("verify", "work/adapters"),)),
    "coefficients": Target(
        "work/full/merge_coefficients.safetensors", (*_RECORD, (*_MERGE, "--coefficients", "work/full"))
    ),
    "sources": Target("work/full/.frmerge_sources.json", _RECORD),
    "options": Target("work/options.json", (("plan", "--config", "work/options.json"),)),
    "journal": Target(
        "work/torn/.frmerge/journal-0.jsonl", ((*_MERGE[:-1], "work/torn", "--max-shard-size", "3KB", "--resume"),)
    ),
    "staged": Target(
        "work/torn/.frmerge/model-00001-of-00003.safetensors.partial",
        ((*_MERGE[:-1], "work/torn", "--max-shard-size", "3KB", "--resume"),),
    ),
}
_ALWAYS_RIGHT = ("journal", "staged")  # if a resume from these ends, it ends in the right bits


class FileAttack:
    """Damages files of copies of a site."""

    def __init__(self, site: Site) -> None:
        children.import_torch()
        self.site = site
        self._ready = site.root / "ready"
        self._prepare()
        self._cpu = {
            command: self._run(command).cpu_seconds for target in TARGETS.values() for command in target.commands
        }

    def __call__(self, name: str, rng: random.Random, tally: Tally) -> None:
        """Damage a file and run one of the commands that read it."""
        target = TARGETS[name]
        command = rng.choice(target.commands)
        self._restore()
        path = self.site.root / target.path
        path.write_bytes(damaged(path.read_bytes(), rng))
        before = {
            each: content for each, content in files_below(self.site.root / "work").items() if "torn" not in each.parts
        }
        ended = self._run(command)
        tally.seen["accepted" if ended.code == 0 else "refused"] += 1
        tally.add((name, *command), self._troubles(name, path, before, command, ended))

    def _troubles(
        self, name: str, damaged_file: Path, before: dict[Path, bytes], command: tuple[str, ...], ended: children.Ended
    ) -> list[str]:
        troubles = [f"{ended.fault}: {ended.text[-400:]}"] if ended.fault else []
        if ended.cpu_seconds > self._cpu[command] + SLOW:
            troubles.append(f"{ended.cpu_seconds:.1f} s of CPU time")
        if "opened outside" in ended.text:
            troubles.append(ended.text[ended.text.index("opened outside") :][:200])
        merged = ("full", "sparse", "adapters")  # whose own commands may write a card or checksums
        changed = [
            path
            for path, content in before.items()
            if path.parts[len(self.site.root.parts) + 1] not in merged
            and (not path.exists() or path.read_bytes() != content)
        ]
        troubles += [f"{path} was changed" for path in changed]
        out = self.site.root / "out"
        if ended.code != 0 and any((out / config).exists() for config in ("config.json", "adapter_config.json")):
            troubles.append("it was refused, and a loader takes the folder for a model")
        if name in _ALWAYS_RIGHT and ended.code == 0:
            trouble = self.site.trouble("full", self.site.root / "work" / "torn")
            troubles += [trouble] if trouble else []
        if troubles:
            kept = self.site.root / f"failed-{name.replace(' ', '-')}"
            shutil.copyfile(damaged_file, kept) if damaged_file.exists() else None
        return troubles

    def _run(self, command: tuple[str, ...]) -> children.Ended:
        empty(self.site.root / "out")
        arguments = [part.replace("OUT", "out") for part in command]
        return children.run(arguments, self.site.log, lambda: self._watch(command))

    def _watch(self, command: tuple[str, ...]) -> None:
        """Report what this process opens outside of the folders it was given."""
        os.chdir(self.site.root)
        root, temporary = self.site.root, Path(tempfile.gettempdir())
        allowed = [*(root / name for name in ("work", "out", "in", "log")), Path(os.devnull)]
        allowed.append(temporary / "frmerge-verify-")  # where `verify` merges adapters again
        if command[-1] == "work/options.json":  # whoever writes this names the inputs, and where the output goes
            allowed += [root, Path(constants.HF_HOME), Path("/dev/zero")]  # one of the strings that mutations put in
        watch_opens(allowed, lambda path: os.write(2, f"opened outside: {path}\n".encode(errors="replace")))

    def _prepare(self) -> None:
        """Copy inputs, merges and an interrupted merge to where they can be taken from again and again."""
        site, work = self.site, empty(self.site.root / "work")
        shutil.copytree(site.root / "in", work)
        for name in site.merges:
            shutil.copytree(site.root / f"wanted-{name}", work / name)
        (work / "options.json").write_text('{"experts": ["work/a", "work/b"], "output_dir": "out", "weights": [1, 2]}')

        def stop_at_the_end() -> None:
            os.chdir(site.root)
            import hf_frmerge.merging.run as run

            run._finish = lambda *_: os._exit(9)  # type: ignore[assignment]

        command = [*_MERGE[:-1], "work/torn", "--max-shard-size", "3KB"]
        assert children.run(command, site.log, stop_at_the_end).code == 9, site.log.read_text()
        shutil.copytree(work, empty(self._ready))

    def _restore(self) -> None:
        shutil.copytree(self._ready, empty(self.site.root / "work"))
