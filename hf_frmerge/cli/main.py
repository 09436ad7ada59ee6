"""Entry point of `frmerge`. Only click is imported at start; each command's module is imported when it runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from hf_frmerge import __version__
from hf_frmerge.visible import visible_lines

# Command -> its module, and its line in `frmerge --help`, which would otherwise have to import all modules.
_COMMANDS = {
    "merge": ("merge", "Merge two or more experts into one model."),
    "add": ("merge", "Merge one more expert into a model that is a merge."),
    "plan": ("preflight", "Show what a merge would do, from file headers alone."),
    "inspect": ("preflight", "Measure angles and norms: can the choice of method matter here?"),
    "evaluate": ("evaluate", "Compare a merged model with its experts on your texts."),
    "compare": ("compare", "Try merge methods on your experts and texts: which is best, by how much?"),
    "search": ("search", "Choose weights by measuring merges: greedy soups, Pareto fronts."),
    "report": ("report", "Show what a merge did, on one HTML page."),
    "verify": ("output", "Recompute a merge and compare it bit for bit."),
    "reproduce": ("reproduce", "Make a pushed merge again from its record, and compare."),
    "diff": ("diff", "Explain how two merges differ."),
    "card": ("output", "Write the model card of a merge again."),
    "push": ("output", "Upload a merge to the Hugging Face Hub."),
    "extract-lora": ("extract", "Turn a fine-tuned model into a LoRA adapter of its base."),
    "demo": ("demo", "Merge three small real experts, compare the methods, and see."),
}


class LazyGroup(click.Group):
    """Group that imports the module of a command on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which they are used on a merge."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command; `None` if there is no such command."""
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"hf_frmerge.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = module.COMMANDS[cmd_name]
        return command

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command. That the system takes no help text, on a full disk, is an error of one line, too."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            raise SystemExit(f"Error: The output could not be written: {error.strerror}.") from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever ends it, click prints its message without a control character in it."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = visible_lines(error.message)  # type: ignore[misc]  # click reads it when it prints
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, package_name="hf_frmerge", prog_name="frmerge")
def main() -> None:
    """Merge fine-tuned language models by the weighted Karcher mean, and see what the merge did."""
