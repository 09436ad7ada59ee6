"""Headers of GGUF files: what the gguf package writes is read, and a damaged one is refused in a sentence."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from hf_frmerge.checkpoints.gguf import header
from hf_frmerge.checkpoints.gguf.header import GgufHeader, GgufTensor, plain_dtype, read_gguf_header
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.errors import CheckpointError

gguf = pytest.importorskip("gguf")

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = setting("general.architecture", STRING, text("llama"))


def tensor(name: str, lengths: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, kind, offset)


def file_of(
    settings: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    """Return a file of settings, tensors and zeros."""
    settings, tensors = settings if settings is not None else [ARCHITECTURE], tensors or []
    n_tensors, n_settings = counts or (len(tensors), len(settings))
    start = magic + struct.pack("<IQQ", version, n_tensors, n_settings) + b"".join(settings + tensors)
    return start + b"\0" * (-len(start) % 32 + data)


def read(folder: Path, content: bytes) -> GgufHeader:
    (folder / "m.gguf").write_bytes(content)
    return read_gguf_header(LocalFolder(str(folder)), "m.gguf", "spec")


def test_what_the_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(7)
    writer.add_bool("a", True)
    writer.add_float32("b", 0.5)
    writer.add_array("c", ["x", "yz"])
    writer.add_array("d", [1, 2, 3])
    writer.add_custom_alignment(64)
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("w", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.add_tensor("v", values.reshape(2, 4, 16).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_header(LocalFolder(str(tmp_path)), "m.gguf", "spec")
    assert found.architecture == "llama"
    assert found.settings["llama.block_count"] == 7 and found.settings["a"] is True and found.settings["b"] == 0.5
    assert found.settings["c"] is None and found.settings["d"] is None
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert found.tensors == tuple(
        GgufTensor(
            each.name,
            int(each.tensor_type),
            tuple(map(int, reversed(each.shape))),
            each.data_offset,
            each.n_bytes,
            each.n_bytes // int(np.prod(each.shape[1:])),
        )
        for each in theirs.tensors
    )


def test_the_dtype_of_files_without_codes() -> None:
    assert plain_dtype([0, 30, 0]) == "BF16" and plain_dtype([0, 1]) == "F16" and plain_dtype([0]) == "F32"
    assert plain_dtype([0, 1, 8]) is None


GOOD = tensor("w", (64, 2), 8, 0)  # 2 rows of 2 blocks of 34 bytes
DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is truncated or damaged: its header needs at least 4 bytes, the file has 0"),
    "other": (file_of(magic=b"PK\3\4"), r"is not a GGUF file: it does not begin with GGUF\. Download it again"),
    "a pointer": (b"version https://git-lfs", "It looks like a Git LFS pointer; run `git lfs pull`"),
    "version": (file_of(version=1), r"is of version 1 of GGUF, expected one of \(2, 3\)\.$"),
    "big-endian": (file_of(version=3 << 24), "It is big-endian, which is not read"),
    "tensors": (file_of(counts=(2**60, 1)), f"announces {2**60} tensors, more than any model has"),
    "settings": (file_of(counts=(0, 2**60)), f"announces {2**60} settings, more than any model has"),
    "a long key": (file_of([struct.pack("<Q", 2**63) + b"x"]), "its header needs at least"),
    "a long string": (file_of([setting("a", STRING, struct.pack("<Q", 2**40))]), "its header needs at least"),
    "a long list": (file_of([setting("a", ARRAY, struct.pack("<IQ", U32, 2**62))]), "has lists of more than 4194304"),
    "long strings": (file_of([setting("a", ARRAY, struct.pack("<IQQ", STRING, 4, 2**50))]), "header needs at least"),
    "lists in a list": (file_of([setting("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "is of type 9, which is none"),
    "an unknown type": (file_of([setting("a", 99, b"")]), "'a' is of type 99, which is none"),
    "twice": (file_of([ARCHITECTURE, ARCHITECTURE]), "has the setting 'general.architecture' twice"),
    "no text": (file_of([setting("a", STRING, text(b"\xff\xfe"))]), "the setting 'a' is not UTF-8"),
    "no architecture": (file_of([]), "does not say of which architecture it is"),
    "a number for it": (file_of([setting("general.architecture", U32, b"\1\0\0\0")]), "does not say of which"),
    "layers": (
        file_of([ARCHITECTURE, setting("llama.block_count", U32, struct.pack("<I", 2**31))]),
        f"llama.block_count is {2**31}, which no model has",
    ),
    "alignment": (
        file_of([ARCHITECTURE, setting("general.alignment", U32, struct.pack("<I", 48))]),
        "general.alignment is 48, expected a power of two",
    ),
    "dimensions": (file_of(tensors=[tensor("w", (1,) * 5, 0, 0)]), "'w' has 5 dimensions"),
    "an unknown code": (file_of(tensors=[tensor("w", (1,), 777, 0)]), "is of type 777, which the gguf package does"),
    "half a block": (file_of(tensors=[tensor("w", (33,), 8, 0)]), "has 33 elements, which are no blocks of 32"),
    "beyond the end": (file_of(tensors=[GOOD], data=135), r"is truncated: its header announces \d+ bytes"),
    "far beyond": (file_of(tensors=[tensor("w", (2**63, 2**63, 2**63), 0, 2**63)], data=136), "is truncated"),
    "on each other": (
        file_of(tensors=[GOOD, tensor("v", (64, 2), 8, 96)], data=300),
        r"tensor 'v' begins at byte \d+, and the one before it ends at byte",
    ),
    "one name": (file_of(tensors=[GOOD, tensor("w", (64, 2), 8, 160)], data=300), r"has tensors twice \(w\)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_headers_are_refused(tmp_path: Path, damage: str) -> None:
    content, sentence = DAMAGES[damage]
    with pytest.raises(CheckpointError, match=sentence) as refused:
        read(tmp_path, content)
    assert str(refused.value).startswith("'spec': m.gguf")


def test_a_list_beyond_the_limit_is_not_walked(tmp_path: Path) -> None:
    n = header._MAX_ELEMENTS
    lists = [setting(key, ARRAY, struct.pack("<IQ", 0, n // 2 + 1) + b"\0" * (n // 2 + 1)) for key in "ab"]
    with pytest.raises(CheckpointError, match="up to 'b', more than any model needs"):
        read(tmp_path, file_of([ARCHITECTURE, *lists]))
    with pytest.raises(CheckpointError, match="has a header of more than 100000000 bytes"):
        (tmp_path / "m.gguf").write_bytes(file_of([setting("a", STRING, struct.pack("<Q", 10**8))]))
        with (tmp_path / "m.gguf").open("r+b") as file:
            file.truncate(2 * 10**8)
        read_gguf_header(LocalFolder(str(tmp_path)), "m.gguf", "spec")


def test_flipped_bytes_are_read_or_refused_in_no_time(tmp_path: Path) -> None:
    strings = setting(
        "tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("b") + text("c")
    )
    whole = file_of([ARCHITECTURE, strings], [GOOD, tensor("v", (4,), 0, 160)], data=176)
    assert [each.name for each in read(tmp_path, whole).tensors] == ["w", "v"]
    rng, started = random.Random(0), time.process_time()
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            content[rng.randrange(len(content))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        try:
            found = read(tmp_path, bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content))
        except CheckpointError:
            continue
        assert all(0 <= each.offset <= each.offset + each.nbytes <= len(whole) for each in found.tensors)
    assert time.process_time() - started < 60
