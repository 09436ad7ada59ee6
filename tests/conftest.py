"""Settings that must hold before the Hugging Face libraries are imported, and fixtures every room uses."""

from __future__ import annotations

import os
import tempfile

# Read once at import by huggingface_hub and transformers: no test may reach the real Hub or the user's cache.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_frmerge_test_home_")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there; the Hub fixture replaces it
os.environ.pop("HF_TOKEN", None)
# Two cores are shared by the test workers: contention inside chunk-sized ops costs 10-100x.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
