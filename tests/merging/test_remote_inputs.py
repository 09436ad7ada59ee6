"""Experts behind URLs give the bits of local ones."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from merge_reference import random_model, write_family, write_model

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves byte ranges, as object stores do; lists no folders, and fails for a while when told to."""

    requests: list[tuple[str, int]]
    fail_after = 10**9

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def list_directory(self, path: Any) -> None:
        self.send_error(403, "No listing")

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        if len(self.requests) >= self.fail_after:
            self.send_error(500, "The disk is on fire")
            return
        data, start, last = path.read_bytes(), int(wanted[1]), int(wanted[2])
        body = data[start : last + 1]
        self.requests.append((path.name, len(body)))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, type[RangeHandler]]]:
    handler = type("Handler", (RangeHandler,), {"requests": []})

    def bound(*args: Any) -> SimpleHTTPRequestHandler:
        return handler(*args, directory=str(tmp_path))

    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """Copies what is below `tmp_path` when called for by URL."""
    store = fsspec.filesystem("memory")
    yield "memory://frmerge-test"
    store.rm("/frmerge-test", recursive=True)


def merge(models: list[str], out: Path, **options: Any) -> None:
    args = MergingArguments(output_dir=str(out), space="deltas", **options)
    run_merge(build_plan(models[1:], args, [0.5, 0.3, 0.2], models[0]), StepObserver(), Processes())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json", "special_tokens_map.json")
    }


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 500)
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    for model in (base, *experts):
        (Path(model) / "special_tokens_map.json").write_text("{}")
    return [base, *experts]


@pytest.mark.parametrize("where", ["memory", "http"])
def test_remote_models_give_the_bits_of_local_ones(
    models: list[str], tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    merge(models, tmp_path / "local")
    url = request.getfixturevalue("memory") if where == "memory" else request.getfixturevalue("web")[0]
    if where == "memory":
        for model in models:
            fsspec.filesystem("memory").put(model, f"{url}/{Path(model).name}", recursive=True)
    remote = [f"{url}/{Path(model).name}" for model in models]
    merge([remote[0], models[1], *remote[2:]], tmp_path / "out", num_workers=2)  # local and remote may be mixed
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    report = verify(tmp_path / "out")
    assert report.ok


def test_a_password_in_an_address_opens_it_and_is_shown_nowhere(
    models: list[str], tmp_path: Path, web: tuple[str, type[RangeHandler]]
) -> None:
    url = web[0].replace("://", "://me:hunter2@")
    args = MergingArguments(output_dir=str(tmp_path / "out"))
    plan = build_plan([f"{url}/{Path(model).name}" for model in models[1:]], args)
    assert plan.experts[0].spec.startswith("http://…@127.0.0.1:") and "hunter2" not in json.dumps(plan.describe())
    run_merge(plan, StepObserver(), Processes())
    assert verify(tmp_path / "out").ok  # they are found again
    holders = [
        path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
    ]
    assert holders == [".frmerge_sources.json"]  # which stays on this machine
    with pytest.raises(CheckpointError, match=r"://…@127\.0\.0\.1") as caught:
        build_plan([f"{url}/nothing", models[0]], args)
    assert "hunter2" not in str(caught.value)


def test_a_web_server_that_fails_leaves_a_merge_that_goes_on(
    models: list[str], tmp_path: Path, web: tuple[str, type[RangeHandler]]
) -> None:
    merge(models, tmp_path / "local")
    url, handler = web
    remote = [f"{url}/{Path(model).name}" for model in models]
    handler.fail_after = 60
    with pytest.raises(CheckpointError, match=r"tensor .*: bytes \d+ to \d+ of \d+ could not be read from http://"):
        merge(remote, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    handler.fail_after = 10**9
    merge(remote, tmp_path / "out", resume_from_checkpoint=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_pieces_are_fetched_by_ranges_twice_and_no_more(
    tmp_path: Path, web: tuple[str, type[RangeHandler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the Gram matrix, once to combine: a model of any size passes through a fixed amount of memory."""
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 100)
    url, handler = web
    experts = [write_model(tmp_path / f"e{i}", random_model(i)) for i in range(2)]
    plan = build_plan([f"{url}/e{i}" for i in range(2)], MergingArguments(output_dir=str(tmp_path / "out")))
    handler.requests.clear()
    run_merge(plan, StepObserver(), Processes())
    fetched = [size for name, size in handler.requests if name == "model.safetensors"]
    tensors = sum(4 * tensor.numel() for tensor in random_model(0).values())
    assert sum(fetched) == 2 * len(experts) * tensors
    assert max(fetched) <= 400
