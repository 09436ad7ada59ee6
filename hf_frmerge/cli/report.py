"""`frmerge report`: write the HTML page of a merge or a comparison, and its figures as files."""

from __future__ import annotations

from pathlib import Path

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only, say


@click.command("report", cls=FrmergeCommand)
@click.argument("output_dir", metavar="DIR")
@click.option("--output", metavar="FILE", help="Page to write. Default: merge_report.html or comparison.html in DIR.")
@click.option("--figures", metavar="FOLDER", help="Write the figures as PNG files here, too.")
def report(output_dir: str, output: str | None, figures: str | None) -> None:
    """
    Show what a merge did, or what a comparison found, on one HTML page.

    The page needs no network. It shows the geometry of the merge in DIR and, after `frmerge evaluate`, what the merged
    model can do, how its predictions moved, where most, and whether a layer collapsed. Of a comparison it shows which
    merge is best, by how much, for which expert, and at what cost.
    """
    with results_only():
        from hf_frmerge.checkpoints.lock import refuse_while_merging
        from hf_frmerge.evaluation.comparison_record import COMPARISON_FILE
        from hf_frmerge.report.comparison_page import save_comparison_figures, write_comparison_page
        from hf_frmerge.report.figures import save_figures
        from hf_frmerge.report.page import write_page

        refuse_while_merging(output_dir)
        is_comparison = (Path(output_dir) / COMPARISON_FILE).exists()
        write, save = (write_comparison_page, save_comparison_figures) if is_comparison else (write_page, save_figures)
        written = [write(output_dir, output)]
        if figures is not None:
            written += save(output_dir, figures).values()
    for path in written:
        say(f"Wrote {path}.")


COMMANDS = {"report": report}
