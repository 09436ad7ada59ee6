"""Check and clear the output folder before a merge."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.disk import remove_file, remove_folder
from hf_frmerge.checkpoints.lock import LOCK_FILE
from hf_frmerge.checkpoints.remote_output import check_vacant
from hf_frmerge.checkpoints.source import check_name
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE
from hf_frmerge.checkpoints.tensors.small_files import CONFIG_FILES
from hf_frmerge.checkpoints.tensors.writer import STAGING, remove_weights
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE
from hf_frmerge.merging.record.manifest import LOCAL_SOURCES_FILE, MANIFEST_FILE, STALE_FILES

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

logger = logging.getLogger(__name__)


def check_output_dir(args: MergingArguments, inputs: Sequence[str]) -> None:
    """
    Check that the output folder is not an input, shares no file with one, and is empty or may be overwritten.

    Raises:
        ArgumentError: If it may not be used; the message names the option that would allow it.
    """
    output = Path(args.output_dir)
    check_name(args.output_dir)
    for path in (output, *output.parents):
        if path.is_dir():
            break
        if path.is_symlink() or path.exists():  # a link is no folder if it leads nowhere
            what = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "a file"
            is_output = "" if path == output else f"is in {str(path)!r}, which "
            raise ArgumentError(
                f"The output folder {args.output_dir!r} {is_output}is {what}. Choose another output_dir."
            )
    if not output.exists():
        return
    _check_is_no_input(output, inputs)
    if args.overwrite or args.resume_from_checkpoint:
        return
    if (output / STAGING).exists():
        raise ArgumentError(
            f"{args.output_dir!r} holds an interrupted merge. Pass --resume (resume_from_checkpoint=True) to go on "
            "with it, or --overwrite to start anew."
        )
    if _holds_files(output):
        raise ArgumentError(
            f"The output folder {args.output_dir!r} is not empty. Choose another, or pass --overwrite "
            "(overwrite=True) to replace the model in it."
        )


def clear_output_dir(args: MergingArguments) -> None:
    """
    Prepare the folder for a new or a resumed merge: remove an older model, or at least its configs.

    While a merge is unfinished the folder must not look like a model, so its configs go in any case.

    Raises:
        ArgumentError: If the folder is uploaded to a URL, there is a model at it, and `overwrite` is not set.
        ResumeError: If a resume was requested, but the folder holds a finished merge, or files of another origin.
    """
    output = Path(args.output_dir)
    staging = output / STAGING
    if args.resume_from_checkpoint:
        _check_resumable(args, output, staging)
    elif not args.overwrite:
        check_vacant(output)
    if args.resume_from_checkpoint and not staging.exists():
        logger.info("Nothing to resume in %s: starting a new merge.", args.output_dir)
    is_new = not (args.resume_from_checkpoint and staging.exists())
    if is_new:
        remove_folder(staging)
        remove_model(output)
    else:
        _remove_configs(output)


def remove_model(output: Path) -> None:
    """Remove a model or adapter and the files about it, so that none of them is taken for a part of the next merge."""
    _remove_configs(output)
    remove_weights(output)
    for name in (ADAPTER_FILE, COEFFICIENTS_FILE, CORRECTIONS_FILE, LOCAL_SOURCES_FILE):
        remove_file(output / name)


def _remove_configs(output: Path) -> None:
    # The configs first: without them no loader takes the rest for a model, should this be interrupted.
    for name in (*CONFIG_FILES.values(), *STALE_FILES):
        remove_file(output / name)


def _check_resumable(args: MergingArguments, output: Path, staging: Path) -> None:
    """Raise `ResumeError` if there is no merge to resume in this folder, and `overwrite` is not set."""
    if staging.is_symlink():
        raise ResumeError(
            f"{staging} is a link, so an interrupted merge is not gone on with there. Start anew with --overwrite "
            "and without --resume, which removes the link and not what it points to."
        )
    if args.overwrite:
        return
    is_loadable = any((output / name).exists() for name in CONFIG_FILES.values())
    if (output / MANIFEST_FILE).exists() and is_loadable:
        remove_folder(staging)  # left by a process that died while it cleaned up
        raise ResumeError(f"The merge in {args.output_dir!r} is complete; there is nothing to resume.")
    if not staging.exists() and output.exists() and _holds_files(output):
        raise ResumeError(
            f"{args.output_dir!r} holds files, but no interrupted merge. Choose another output_dir, or pass "
            "--overwrite (overwrite=True) to replace the model in it."
        )


def _check_is_no_input(output: Path, inputs: Sequence[str]) -> None:
    """Raise if the output folder is an input, or holds a file or folder of one, under whatever name (links)."""
    places = (Path(path) for path in inputs)
    folders = (place.parent if place.is_file() else place for place in places)
    for folder in (folder for folder in folders if output.is_dir() and folder.is_dir()):
        if output.samefile(folder):
            raise ArgumentError(f"The output folder {str(output)!r} is also an input. Choose another output_dir.")
        of_input = {_inode(path): path for path in _files(folder)}
        shared = {path: of_input[_inode(path)] for path in _files(output) if _inode(path) in of_input}
        # A linked subfolder (additional_chat_templates, say) would be written into, too.
        shared |= {
            path: path.resolve()
            for path in output.iterdir()
            if path.is_symlink() and path.is_dir() and path.resolve().is_relative_to(folder.resolve())
        }
        if shared:
            path, original = next(iter(shared.items()))
            raise ArgumentError(
                f"{path} and {original} of an input are one and the same under two names. Remove {path}, which leaves "
                "the input as it is, or choose another output_dir."
            )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _holds_files(folder: Path) -> bool:
    return any(path.name != LOCK_FILE for path in folder.iterdir())
