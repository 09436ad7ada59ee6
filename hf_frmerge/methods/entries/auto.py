"""The choice of a method, in place of one."""

from __future__ import annotations

from hf_frmerge.methods.method import Method

AUTO = Method(
    "auto",
    "span",
    "a method chosen for these experts",
    "the experts are averaged, and the average is stretched as far as that has helped experts of their kind.",
    "A mean of changes at right angles is shorter than each of them. How much stretching is good depends on the "
    "experts; a few prompts tell more than a rule.",
    options=("norm", "scale", "on_ambiguous"),
)
"""A merge is planned by the method that this is resolved to: no engine runs it."""
