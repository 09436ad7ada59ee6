"""The parts of the record of a merge: its models, their files, its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_frmerge.kernels.elementwise import Band, Elementwise
from hf_frmerge.merging.decisions import Geometry, Solution, elementwise_of, geometry_of, spectral_of
from hf_frmerge.methods.spectral.decision import Spectral

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.merging.decisions import Decision


@dataclass(frozen=True)
class RecordedFile:
    """
    A file that was read or written.

    Attributes:
        size: in bytes.
        sha256: `None` of a large file until the model is pushed or verified with `--sha256`.
        header_xxh3_128: of written weights: digest of the header, its length included.
    """

    size: int
    sha256: str | None
    header_xxh3_128: str | None = None

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> RecordedFile:
        """Read it from JSON values."""
        return cls(entry["size"], entry["sha256"], entry.get("header_xxh3_128"))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = {"size": self.size, "sha256": self.sha256}
        return values if self.header_xxh3_128 is None else {**values, "header_xxh3_128": self.header_xxh3_128}


@dataclass(frozen=True)
class RecordedFolder:
    """
    A full model or an adapter that was read.

    Attributes:
        id: Hub id, or the name of a local folder; never a path.
        revision: what was asked for.
        commit: what it stood for on the Hub.
        files: what was read of it, by name.
    """

    id: str
    on_hub: bool
    revision: str | None
    commit: str | None
    kind: Literal["full", "adapter"]
    files: dict[str, RecordedFile]

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> RecordedFolder:
        """Read it from JSON values."""
        return RecordedFolder(
            entry["id"],
            entry["on_hub"],
            entry["revision"],
            entry["commit"],
            entry["kind"],
            files_of(entry["files"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "files": {name: file.to_dict() for name, file in self.files.items()}}


@dataclass(frozen=True)
class RecordedModel(RecordedFolder):
    """
    An expert or the base model.

    Attributes:
        weight: of an expert; `None` of the base model.
        adapter: of a full model that was read with an adapter on it (`base+adapter`): this adapter. All else is then
            about the model.
    """

    weight: float | None = None
    adapter: RecordedFolder | None = None

    @property
    def name(self) -> str:
        """What to call it: its id, with that of an adapter on it."""
        return "+".join(part.id for part in self.parts)

    @property
    def pinned(self) -> str | None:
        """Hub id at the recorded commit, with that of an adapter on it; `None` if one of them is local."""
        pinned = [f"{part.id}@{part.commit}" for part in self.parts if part.on_hub]
        return "+".join(pinned) if len(pinned) == len(self.parts) else None

    @property
    def parts(self) -> tuple[RecordedFolder, ...]:
        """The model and the adapter on it."""
        return (self,) if self.adapter is None else (self, self.adapter)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> RecordedModel:
        """Read it from JSON values."""
        adapter = entry.get("adapter")
        return cls(
            **vars(RecordedFolder.from_dict(entry)),
            weight=entry.get("weight"),
            adapter=RecordedFolder.from_dict(adapter) if adapter is not None else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = super().to_dict()
        if self.adapter is not None:
            values["adapter"] = self.adapter.to_dict()
        return {key: value for key, value in values.items() if value is not None or key not in ("weight", "adapter")}


@dataclass(frozen=True)
class RecordedTensor:
    """
    A tensor of the merged model; for a merged adapter, of the base model that it changes.

    Attributes:
        action: `merge`, `copy`, or `skip` if a callback had it copied.
        dtype: safetensors' name of it.
        inputs: digest of every input by role (`"-1"` is the base, `"0"`, `"1"`, ... the experts).
        output: digest of what was written.
        donor: of a copy: index of the expert it is from, -1 for the base.
        n_blocks: blocks it was cut into; 0 of a copy.
        decision: what the method decided. `None` of copies, and of coefficients, which have a file of their own.
        rank, norm, truncation_error: of a module of an adapter, as `FactorDetails` has them. Version 2 has no norm.
        geometry: what was measured of the experts, if anything was.
        n_saturated: values that were beyond the dtype and became its largest number (`on_overflow`).
        is_fitted: whether its coefficients were found with prompts, and do not follow from its values alone.
    """

    action: Literal["merge", "copy", "skip"]
    dtype: str
    shape: tuple[int, ...]
    inputs: dict[str, str]
    output: str
    donor: int | None = None
    n_blocks: int = 0
    decision: Elementwise | Spectral | None = None
    rank: int | None = None
    norm: float | None = None
    truncation_error: float | None = None
    geometry: Geometry | None = None
    n_saturated: int = 0
    is_fitted: bool = False

    def decision_with(self, coefficients: NDArray[np.float64] | None) -> Decision | None:
        """
        Return the decision the tensor came from, `None` if the record has none.

        Args:
            coefficients: Of the tensor, in the coefficient table.
        """
        if self.decision is not None or coefficients is None:
            return self.decision
        return Solution(coefficients, self.geometry)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> RecordedTensor:
        """Read it from JSON values."""
        geometry = entry.get("geometry")
        return cls(
            action=entry["action"],
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            inputs=entry["inputs_xxh3_128"],
            output=entry["output_xxh3_128"],
            donor=entry.get("donor"),
            n_blocks=entry.get("n_blocks", 0),
            decision=_decision(entry["decision"]) if "decision" in entry else None,
            rank=entry.get("rank"),
            norm=entry.get("norm"),
            truncation_error=entry.get("truncation_error"),
            geometry=geometry_of(geometry) if geometry is not None else None,
            n_saturated=entry.get("n_saturated", 0),
            is_fitted=entry.get("is_fitted", False),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values: dict[str, Any] = {
            "action": self.action,
            "dtype": self.dtype,
            "shape": self.shape,
            "inputs_xxh3_128": self.inputs,
            "output_xxh3_128": self.output,
        }
        if self.n_saturated:
            values["n_saturated"] = self.n_saturated
        if self.action != "merge":
            return {**values, "donor": self.donor}
        decided = {} if self.decision is None else self.decision.to_journal()
        kinds = {Elementwise: "elementwise", Spectral: "spectral", type(None): "coefficients"}
        decision = {"kind": kinds[type(self.decision)], **decided}
        values |= {"n_blocks": self.n_blocks, "decision": decision}
        if self.is_fitted:
            values["is_fitted"] = True
        if self.rank is not None:
            values |= {"rank": self.rank, "norm": self.norm, "truncation_error": self.truncation_error}
        return values if self.geometry is None else {**values, "geometry": vars(self.geometry)}


@dataclass(frozen=True)
class Machine:
    """Where a merge was computed, as `platform` names it."""

    architecture: str
    system: str


def files_of(entries: dict[str, dict[str, Any]]) -> dict[str, RecordedFile]:
    """Read files by name from JSON values."""
    return {name: RecordedFile.from_dict(entry) for name, entry in entries.items()}


def _decision(entry: dict[str, Any]) -> Elementwise | Spectral | None:
    if entry["kind"] == "elementwise":
        return elementwise_of(entry)
    if entry["kind"] == "spectral":
        return spectral_of(entry)
    if entry["kind"] == "trimming":  # how TIES was recorded before there were other sparse methods
        return Elementwise(Band(tuple(entry["thresholds"])), "elect", tuple(entry["weights"]), entry["scale"])
    if entry["kind"] == "coefficients":
        return None
    raise ValueError(f"a decision of kind {entry['kind']!r}")
