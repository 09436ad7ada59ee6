"""The folder that a GGUF file stands for: the files beside it, and what they lack, made of its own settings."""

from __future__ import annotations

from pathlib import Path

from hf_frmerge.checkpoints.gguf.made_files import CONFIG, TOKENIZER, MadeFiles, made_config, made_tokenizer
from hf_frmerge.checkpoints.local_folder import LocalFolder

# Any of them shows that the folder has a tokenizer.
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"})


class GgufFolder(LocalFolder):
    """
    Folder of a model in a GGUF file.

    It has the files that lie beside it, if a config or tokenizer is among these: else it lies among files that have
    nothing to do with it. If there is no `config.json`, it has the one that transformers makes of the settings in the
    file, and if there is no tokenizer, the files of the one that it makes of these.

    Args:
        file: Path of the file, of a split model that of the first one.
    """

    def __init__(self, file: str) -> None:
        path = Path(file)
        super().__init__(str(path.parent))
        self._file = path.name

    def names(self, subfolder: str = "") -> list[str]:
        """List the files as `LocalFolder` does, with those that are made."""
        names = super().names(subfolder) if self._is_its_own() else [self._file]
        return names if subfolder else sorted({*names, CONFIG, *self._tokenizer().files})

    def subfolders(self) -> list[str]:
        """List the folders as `LocalFolder` does."""
        return super().subfolders() if self._is_its_own() else []

    def exists(self, name: str) -> bool:
        """Whether there is a file `name`, or one is made."""
        return super().exists(name) or self._made(name) is not None

    def is_file(self, name: str) -> bool:
        """Whether `name` is a file or is made."""
        return super().is_file(name) or self._made(name) is not None

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        made = self._made(name)
        return super().size(name) if made is None else len(made)

    def identity(self, name: str) -> str:
        """Return a mark that changes when the file, or the one it is made of, is rewritten."""
        return super().identity(name if self._made(name) is None else self._file)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes `[start, stop)` of `name`."""
        made = self._made(name)
        return super().read(name, start, stop) if made is None else made[start:stop]

    @property
    def notes(self) -> list[str]:
        """What a model that is made of these files should be told of."""
        config = [] if super().is_file(CONFIG) else self._config().notes
        return [*config, *self._tokenizer().notes]

    def check_architecture(self) -> None:
        """Raise `CheckpointError` if transformers does not know how llama.cpp stores models of this architecture."""
        self._config()

    def _is_its_own(self) -> bool:
        return not {CONFIG, *_TOKENIZERS}.isdisjoint(super().names())

    def _made(self, name: str) -> bytes | None:
        """Return the contents of a file that is made, None for others."""
        if super().is_file(name):
            return None
        if name == CONFIG:
            return self._config().files[name]
        return self._tokenizer().files.get(name) if name in TOKENIZER else None

    def _config(self) -> MadeFiles:
        return made_config(str(self._root / self._file), super().identity(self._file))

    def _tokenizer(self) -> MadeFiles:
        if not _TOKENIZERS.isdisjoint(super().names()):
            return MadeFiles({}, [])
        return made_tokenizer(str(self._root / self._file), super().identity(self._file))
