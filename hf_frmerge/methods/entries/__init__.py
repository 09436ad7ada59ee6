"""Descriptions of the methods, a file for each kind; `methods.table` joins them."""

from __future__ import annotations
