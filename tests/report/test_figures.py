"""What is drawn is what the records say: the artists' own data against numbers worked out from the records here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from evaluation_records import make_record
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_frmerge.errors import CheckpointError, MergeError
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, LayerActivations, Recovered
from hf_frmerge.merging.planning.coefficient_table import read_coefficients
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.report import figures
from hf_frmerge.report.facts import read_facts
from hf_frmerge.report.figures import draw_figures, save_figures
from hf_frmerge.report.function_figures import distances_figure, recovery_figure
from hf_frmerge.report.geometry_figures import angles_figure, coefficients_figure
from hf_frmerge.report.representation_figures import layers_figure
from hf_frmerge.report.style import NARROW, PALETTE, WIDE, compact, spread

Q_PROJ = "model.layers.{}.self_attn.q_proj.weight"


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def line(axes: Axes, label: str) -> np.ndarray:
    return next(np.asarray(actual.get_ydata()) for actual in axes.lines if actual.get_label() == label)


def many(n_experts: int, n_layers: int) -> EvaluationRecord:
    """A record of more experts, each its own number times as wide as the first."""
    record = make_record(n_layers)
    names = [f"expert {number}" for number in range(n_experts)]
    record.models = {"base": "base", **dict.fromkeys(names, "expert"), MERGED: "merged"}
    record.weights = dict.fromkeys(names, 1 / n_experts)
    record.layers = [
        LayerActivations(model, layer, factor * (1 + layer), factor * 10.0)
        for model, factor in [(MERGED, 1.0), *((name, 1.0 + number) for number, name in enumerate(names))]
        for layer in range(n_layers + 1)
    ]
    record.recovery = [Recovered(MERGED, name, "math", 1.0, 0.5, 0.5) for name in names]
    pattern = record.distances[0]
    record.distances = [replace(pattern, other=name) for name in names]
    return record


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_layers_are_drawn_as_measured_and_over_the_mean_of_the_experts(evaluated: Path, width: float) -> None:
    record = make_record()
    axes = drawn(layers_figure(read_facts(evaluated), width)).axes
    for number, measure in enumerate(("activation_variance", "effective_rank")):
        values, ratios = axes[2 * number], axes[2 * number + 1]
        for model in record.models:
            expected = [getattr(row, measure) for row in record.layers if row.model == model]
            np.testing.assert_allclose(line(values, model), expected)
        # The experts of this record are equal in every layer; the merged model has 0.6 of them in layer 4.
        np.testing.assert_allclose(line(ratios, MERGED), [1, 1, 1, 1, 0.6, 1, 1])
        assert words(ratios) == ["lowest: 0.60 in layer 4"]
        assert set(words(values)) == {"base", "expert-math", "expert-code", "merged"}
        assert values.get_ylabel() and ratios.get_xlabel().startswith("layer")


def test_many_experts_become_a_band(merge: Callable[..., Path]) -> None:
    values, ratios, *_ = drawn(layers_figure(read_facts(merge(record=many(9, 126))))).axes
    (band,) = values.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 9 * 127.0)  # layer 0 of the first, layer 126 of the last
    np.testing.assert_allclose(line(values, "mean of the experts"), 5.0 * np.arange(1, 128))
    np.testing.assert_allclose(line(ratios, MERGED), 1 / 5)
    assert values.get_yscale() == "log"


def test_histograms_pool_the_domains(evaluated: Path) -> None:
    figure = drawn(distances_figure(read_facts(evaluated)))
    record = make_record()
    for axes, expert in zip(figure.axes, ("expert-math", "expert-code"), strict=True):
        assert axes.get_title(loc="left").endswith(f"from {expert}")
        rows = [row for row in record.distances if (row.model, row.other) == (MERGED, expert)]
        assert len(rows) == 2  # two domains
        counts = np.array([[count for _, count in row.histogram] for row in rows], dtype=float).sum(axis=0)
        stairs = {patch.get_label(): patch.get_data() for patch in axes.patches}
        np.testing.assert_allclose(stairs["merged"].values, counts / counts.sum())
        np.testing.assert_allclose(stairs["merged"].edges, np.linspace(0, math.pi, 21))
        assert words(axes) == [f"merged: {rows[0].fisher_rao.mean:.2f} rad", "other experts: 0.90 rad"]
    assert "(rad)" in figure.get_supxlabel()


def test_recovery_bars_are_shares_and_say_where_there_is_none(merge: Callable[..., Path]) -> None:
    rows = [
        Recovered(MERGED, "expert-math", "math", 1.0, 0.7, 0.7),
        Recovered(MERGED, "expert-code", "code", -0.1, 0.2, None),
        Recovered(MERGED, "third", "third", 0.1, -0.5, -5.0),
        Recovered("expert-math", "expert-code", "code", 1.0, 0.1, 0.1),  # not of the merged model
    ]
    (axes,) = drawn(recovery_figure(read_facts(merge(record=make_record(recovery=rows))))).axes
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.0, -1.0]  # the last is cut, its number is not
    assert words(axes)[:3] == [
        "70 %  (0.70 of 1.00 nats a token)",
        "no better than the base",
        "-500 %  (-0.50 of 0.10 nats a token)",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["expert-math", "expert-code", "third"]


def test_angles_are_medians_over_the_tensors(merge: Callable[..., Path]) -> None:
    folder = merge(3)
    tensors = read_manifest(folder).tensors
    expected = np.median([tensor.geometry.pair_angles for tensor in tensors.values()], axis=0)
    pairs, layers = drawn(angles_figure(read_facts(folder))).axes
    shown = np.ma.filled(pairs.images[0].get_array(), np.nan)
    np.testing.assert_allclose([shown[0, 0], shown[1, 0], shown[1, 1]], expected)  # pairs 01, 02, 12
    assert np.isnan(shown[0, 1])
    assert words(pairs) == [f"{angle:.2f}" for angle in expected]
    dots = next(actual for actual in layers.lines if actual.get_label() == "tensors")
    inside = {name: tensor.geometry for name, tensor in tensors.items() if ".layers." in name}
    assert dots.get_xdata().tolist() == [int(name.split(".")[2]) for name in inside]
    np.testing.assert_allclose(dots.get_ydata(), [geometry.mean_angle for geometry in inside.values()])
    largest = max(inside, key=lambda name: inside[name].mean_angle)
    kind = largest.split(".", 3)[3].removesuffix(".weight")
    assert words(layers) == [f"{inside[largest].mean_angle:.3g} rad: {kind}"]


def test_two_experts_have_one_angle_and_no_heat_map(merge: Callable[..., Path]) -> None:
    (axes,) = drawn(angles_figure(read_facts(merge(2)))).axes
    assert not axes.images


@pytest.mark.parametrize("block", ["tensor", "row"])
def test_coefficients_are_those_of_the_table_over_the_weights(merge: Callable[..., Path], block: str) -> None:
    folder = merge(3, block=block)
    table = read_coefficients(folder).rows
    panels = drawn(coefficients_figure(read_facts(folder))).axes[:3]
    assert [axes.get_title(loc="left") for axes in panels] == ["e0", "e1", "e2"]
    rows = [label.get_text() for label in panels[0].get_yticklabels()]
    for index, (axes, weight) in enumerate(zip(panels, (0.5, 0.3, 0.2))):
        shown = axes.images[0].get_array()
        assert shown.shape == (len(rows), 2)
        for layer in (0, 1):
            expected = table[Q_PROJ.format(layer)][:, index].mean() / weight
            assert shown[rows.index("q_proj"), layer] == pytest.approx(expected)
        head = table["lm_head.weight"][:, index].mean() / weight
        np.testing.assert_allclose(shown[rows.index("lm_head")], head)  # in no layer: the same all along


def test_an_average_has_no_pattern_to_show(merge: Callable[..., Path]) -> None:
    """All coefficients are the weights, so all colours must be one, at the middle of the scale."""
    for axes in drawn(coefficients_figure(read_facts(merge(2, method="linear")))).axes[:2]:
        image = axes.images[0]
        np.testing.assert_allclose(image.norm(image.get_array()), 0.5, atol=1e-6)


def test_files_are_written_for_what_was_measured(merge: Callable[..., Path], tmp_path: Path) -> None:
    folder = merge()
    assert sorted(save_figures(folder, tmp_path / "a" / "b")) == ["angles", "coefficients"]
    for name, path in save_figures(folder, tmp_path / "again").items():
        assert path == tmp_path / "again" / f"{name}.png"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.read_bytes() == (tmp_path / "a" / "b" / f"{name}.png").read_bytes()  # one record, one file


def test_settings_of_the_user_are_neither_used_nor_changed(evaluated: Path, tmp_path: Path) -> None:
    plain = {name: path.read_bytes() for name, path in save_figures(evaluated, tmp_path / "plain").items()}
    assert sorted(plain) == sorted(figures.FIGURES)
    loud = {"font.size": 30.0, "axes.facecolor": "red", "text.color": "red", "font.family": "serif"}
    with matplotlib.rc_context(loud):
        before = dict(matplotlib.rcParams)
        styled = {name: path.read_bytes() for name, path in save_figures(evaluated, tmp_path / "styled").items()}
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(("n_experts", "n_layers"), [(2, 2), (5, 30), (16, 126)])
@pytest.mark.filterwarnings("error")  # matplotlib warns when there is no room for what was asked
def test_nothing_is_drawn_outside(merge: Callable[..., Path], n_experts: int, n_layers: int, width: float) -> None:
    record = many(n_experts, n_layers)
    for name, figure in draw_figures(read_facts(merge(record=record)), width).items():
        figure.draw_without_rendering()
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            box = axes.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1 and box.y0 >= -1, name
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, name


def test_numbers_that_are_not_finite_leave_gaps(merge: Callable[..., Path]) -> None:
    record = make_record()
    record.layers[0] = replace(record.layers[0], effective_rank=math.nan)  # read back as None
    record.recovery = []
    actual = draw_figures(read_facts(merge(record=record)))
    assert "recovery" not in actual
    ranks = line(actual["layers"].axes[2], "base")
    assert np.isnan(ranks[0]) and not np.isnan(ranks[1:]).any()


def test_without_matplotlib_a_sentence_says_what_to_install(
    merge: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(MergeError, match=r"pip install 'hf_frmerge\[report\]'"):
        draw_figures(read_facts(merge()))


def test_a_folder_without_a_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no merge_manifest\.json"):
        save_figures(tmp_path, tmp_path)


def test_labels_are_moved_apart_as_little_as_possible() -> None:
    assert spread([0.0, 0.5, 1.0], 0.1) == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(spread([0.5, 0.5, 0.5], 0.1), [0.4, 0.5, 0.6])
    np.testing.assert_allclose(spread([0.0, 0.1, 1.0], 0.2), [-0.05, 0.15, 1.0])


@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(paper: int) -> None:
    """WCAG 2.1: 3:1 for graphics, 4.5:1 for text."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    ground = luminance(PALETTE["paper"][paper])
    for role, colours in PALETTE.items():
        if role not in ("paper", "grid"):
            light = luminance(colours[paper])
            contrast = (max(light, ground) + 0.05) / (min(light, ground) + 0.05)
            assert contrast >= (4.5 if role in ("ink", "muted") else 3.0), role


def test_long_names_lose_what_all_begin_with() -> None:
    names = ["Qwen2.5-7B-math", "Qwen2.5-7B-medicine"]
    assert compact(names, 20) == names
    assert compact(names, 12) == ["math", "medicine"]  # not "ath": names are cut where a word begins
    assert compact(["a" * 30], 9) == ["aaaa…aaaa"]


def test_kinds_leave_out_what_all_have_in_common(merge: Callable[..., Path]) -> None:
    kinds = {tensor.name: (tensor.layer, tensor.kind) for tensor in read_facts(merge()).tensors}
    assert kinds[Q_PROJ.format(1)] == (1, "self_attn.q_proj")
    assert kinds["model.embed_tokens.weight"] == (None, "model.embed_tokens")
