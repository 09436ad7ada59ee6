"""`frmerge verify`, `frmerge card` and `frmerge push`: commands for a finished merge."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from hf_frmerge.cli.command import FAILURE, FrmergeCommand, pickle_option, results_only, say, token_option


@click.command("verify", cls=FrmergeCommand)
@click.argument("output_dir", metavar="DIR | HUB_ID")
@click.option("--experts", multiple=True, metavar="EXPERT", help="Where an expert is now; give all, in their order.")
@click.option("--base-model", metavar="MODEL", help="Where the base model is now.")
@click.option(
    "--sha256", is_flag=True, help="Compare weight files by SHA-256 too, and record those that the manifest lacks."
)
@pickle_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def verify(
    ctx: click.Context,
    output_dir: str,
    experts: tuple[str, ...],
    base_model: str | None,
    sha256: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """
    Recompute a merge and compare it bit for bit.

    A pushed merge is named by its Hub id (org/name or org/name@revision): it is downloaded, and its experts are taken
    at the commits in its manifest.

    Every tensor is derived again from the experts and the recorded coefficients, and every file checked against the
    manifest. The exit code is 1 if anything differs.
    """
    with results_only():
        from hf_frmerge.provenance.verify import verify as verify_folder

        report = verify_folder(
            output_dir, experts=experts or None, base_model=base_model, sha256=sha256, allow_pickle=allow_pickle
        )
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        from hf_frmerge.cli.render.merges import print_verification

        print_verification(report, output_dir)
    ctx.exit(0 if report.ok else FAILURE)


@click.command("card", cls=FrmergeCommand)
@click.argument("output_dir", metavar="DIR")
@click.option("--hub-model-id", metavar="ID", help="Where the model is on the Hub; the code in the card uses it.")
def card(output_dir: str, hub_model_id: str | None) -> None:
    """
    Write the model card of a merge again, with figures if matplotlib is installed.

    What you wrote between the user markers of README.md is kept.
    """
    with results_only():
        from hf_frmerge.checkpoints.lock import refuse_while_merging, sole_writer
        from hf_frmerge.hub.card.describe import describe_merge
        from hf_frmerge.merging.record.manifest import read_manifest
        from hf_frmerge.report.figures import figure_drawer

        refuse_while_merging(output_dir)
        read_manifest(output_dir)  # of a folder that is no merge nothing is touched
        with sole_writer(output_dir):
            path = describe_merge(output_dir, draw=figure_drawer(), hub_model_id=hub_model_id)
    say(f"Wrote {path}.")


@click.command("push", cls=FrmergeCommand, on_interrupt="Push again: what has arrived is not sent twice.")
@click.argument("output_dir", metavar="DIR")
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="Who sees a new repository. Default: what the account says.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to. Default: main.")
@token_option
@click.option("--collection", metavar="SLUG", help="Collection to which the model is added.")
@click.option("--message", default="Upload merged model", show_default=True, help="Message of the commit.")
def push(
    output_dir: str,
    repo_id: str,
    private: bool | None,
    create_pr: bool,
    revision: str | None,
    token: str | None,
    collection: str | None,
    message: str,
) -> None:
    """
    Upload a merge to the Hugging Face Hub: model, record and card in one commit.

    The card is written again, for the model as it will be called; a README.md of your own is sent as it is.
    """
    with results_only():
        from hf_frmerge.checkpoints.lock import sole_writer
        from hf_frmerge.hub.card.card import has_own_card
        from hf_frmerge.hub.card.describe import describe_merge
        from hf_frmerge.hub.outgoing import check_complete
        from hf_frmerge.hub.push import check_branch, full_repo_id, push_folder
        from hf_frmerge.report.figures import figure_drawer

        # Before the card is rewritten: what cannot be pushed should stay untouched.
        check_complete(Path(output_dir))
        check_branch(revision, create_pr)
        repo_id = full_repo_id(repo_id, token)
        # A README.md that the user wrote is never overwritten.
        if has_own_card(output_dir):
            with sole_writer(output_dir):
                describe_merge(output_dir, draw=figure_drawer(), hub_model_id=repo_id)
        commit = push_folder(
            output_dir,
            repo_id=repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            collection=collection,
        )
    say(f"Pushed {output_dir}: {commit.pr_url or commit.commit_url}")


COMMANDS = {"verify": verify, "card": card, "push": push}
