"""Settings that must hold before the Hugging Face libraries are imported, and fixtures every room uses."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # helpers of the tests, such as hub_server, import by their name

from hub_server import ALICE_TOKEN, HubServer

# One Hub a process (so one a worker of pytest-xdist), on a free port, gone with the process.
_HUB = HubServer().start()

# Read once at import by huggingface_hub and transformers: no test may reach the real Hub or the user's cache.
os.environ["HF_ENDPOINT"] = _HUB.endpoint
# Nothing of earlier runs is known, and nothing of this one is left: the folder goes with the process.
_CACHES = tempfile.TemporaryDirectory(prefix="hf_frmerge_tests_")
os.environ["HF_HOME"] = str(Path(_CACHES.name, "home"))
os.environ["HF_FRMERGE_CACHE"] = str(Path(_CACHES.name, "cache"))
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("HF_TOKEN", None)
# Two cores are shared by the test workers: contention inside chunk-sized ops costs 10-100x.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell makes what it starts in the background ignore Ctrl-C; tests interrupt merges, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# New examples are for those who develop; what was right yesterday must not fail a stranger's build today.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Empty Hub, to which `HF_ENDPOINT` points, with one user, `alice` of the organisation `lab`."""
    _HUB.reset()
    _HUB.add_user("alice", ALICE_TOKEN, organisations=("lab",))
    yield _HUB
    _HUB.reset()
