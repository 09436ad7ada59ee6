"""A merge: its arguments, planning, engine, record and callbacks."""

from __future__ import annotations
