"""Where merged tensors go."""

from __future__ import annotations
