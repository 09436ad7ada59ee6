"""Small real checkpoints, written by transformers, and a plain web server that answers byte ranges."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint

SaveModel = Callable[..., PreTrainedModel]

_CLASSES = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": (
        BertForMaskedLM,
        BertConfig,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 50, "max_position_embeddings": 32},
    ),
}


@pytest.fixture
def save_model() -> SaveModel:
    """Build, fill with seeded noise (biases and norms too), and save a tiny model."""

    def save(
        folder: Path,
        kind: str = "llama",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        max_shard_size: str = "50GB",
        **config: Any,
    ) -> PreTrainedModel:
        model_class, config_class, defaults = _CLASSES[kind]
        model = model_class(config_class(**{**defaults, **config}))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model = model.to(dtype).eval()
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model

    return save


@pytest.fixture
def open_folder_as() -> Iterator[Callable[..., Checkpoint]]:
    """Open a folder or URL as a full checkpoint, under a name for errors; closed at the end."""
    opened: list[Checkpoint] = []

    def open_as(path: Path | str, spec: str | None = None) -> Checkpoint:
        opened.append(open_checkpoint(Source(spec or str(path), "full", str(path))))
        return opened[-1]

    yield open_as
    for checkpoint in opened:
        checkpoint.close()


class _RangeHandler(SimpleHTTPRequestHandler):
    """Serves files with single byte ranges, as object stores do; lists no folders."""

    ignore_ranges = False
    ranges: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def list_directory(self, path: Any) -> None:
        self.send_error(403, "No listing")

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or self.ignore_ranges or not path.is_file():
            super().do_GET()
            return
        start, last = int(wanted[1]), int(wanted[2])
        self.ranges.append(f"{path.name} {start}-{last}")
        data = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{min(last, len(data) - 1)}/{len(data)}")
        body = data[start : last + 1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, type[_RangeHandler]]]:
    """URL of a web server over `tmp_path`, and its handler class, which logs ranges and can be told to ignore them."""
    handler = type("Handler", (_RangeHandler,), {"ranges": [], "ignore_ranges": False})

    def bound(*args: Any) -> SimpleHTTPRequestHandler:
        return handler(*args, directory=str(tmp_path))

    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
