"""`frmerge report`: write the HTML page of a merge, and its figures as files."""

from __future__ import annotations

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only, say


@click.command("report", cls=FrmergeCommand)
@click.argument("output_dir", metavar="DIR")
@click.option("--output", metavar="FILE", help="Page to write. Default: merge_report.html in DIR.")
@click.option("--figures", metavar="FOLDER", help="Write the figures as PNG files here, too.")
def report(output_dir: str, output: str | None, figures: str | None) -> None:
    """
    Show what a merge did, on one HTML page.

    The page needs no network. It shows the geometry of the merge in DIR and, after `frmerge evaluate`, what the merged
    model can do, how its predictions moved, where most, and whether a layer collapsed.
    """
    with results_only():
        from hf_frmerge.checkpoints.lock import refuse_while_merging
        from hf_frmerge.report.figures import save_figures
        from hf_frmerge.report.page import write_page

        refuse_while_merging(output_dir)
        written = [write_page(output_dir, output)]
        if figures is not None:
            written += save_figures(output_dir, figures).values()
    for path in written:
        say(f"Wrote {path}.")


COMMANDS = {"report": report}
