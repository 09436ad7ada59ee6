"""Arguments, state, callbacks and reporting of a merge, and the engine that plans and carries it out."""

from __future__ import annotations
