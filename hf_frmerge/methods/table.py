"""Table of all methods. Choices, help, planning, card and report derive from it; no other module names a method."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from hf_frmerge.methods.entries.auto import AUTO
from hf_frmerge.methods.entries.calibrated import CALIBRATED
from hf_frmerge.methods.entries.span import SPAN
from hf_frmerge.methods.entries.sparse import SPARSE
from hf_frmerge.methods.entries.spectral import SPECTRAL
from hf_frmerge.methods.method import Method

GIVEN = (
    Method(
        "given",
        "given",
        "coefficients from a table",
        "the merged values are a sum of the experts' values, each times a coefficient that was given for it.",
        "The coefficients were found elsewhere: by another merge, by an optimisation, or by hand.",
        options=("coefficients",),
        tags=("coefficient-table",),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*SPAN, *SPARSE, *SPECTRAL, *CALIBRATED, *GIVEN)}

CHOICES: Mapping[str, Method] = ChainMap({AUTO.name: AUTO}, METHODS)
"""What the option takes: the methods, and the choice among them, of which no plan knows any more."""
