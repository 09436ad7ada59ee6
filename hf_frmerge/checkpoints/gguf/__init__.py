"""GGUF files: what their headers say, and the folder that one stands for."""

from __future__ import annotations
