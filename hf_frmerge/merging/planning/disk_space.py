"""Check before a merge that downloads and output fit on their disks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.tensors.writer import STAGING, check_free_space
from hf_frmerge.errors import MergeError
from hf_frmerge.merging.planning.build_plan import is_downloaded

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


def check_space(plan: MergePlan) -> None:
    """
    Check that the output fits on its disk and the downloads on that of the cache, also if it is the same disk.

    Raises:
        MergeError: If they do not fit; the message gives the needed and the free space.
    """
    output = Path(plan.args.output_dir)
    begun = plan.args.resume_from_checkpoint and (output / STAGING).exists()
    # A resumed merge has its files already, at full size.
    needed = plan.layout.file_bytes if plan.layout and not begun else 0
    download = download_bytes(plan)
    if download == 0:
        check_free_space(output, needed)
        return
    from hf_frmerge.checkpoints.hub.find import cache_folder, check_cache_space

    check_cache_space(download)
    check_free_space(output, needed)
    if cache_folder().stat().st_dev == _existing(output).stat().st_dev:
        try:
            check_free_space(output, needed + download)
        except MergeError as error:
            raise MergeError(
                f"The download ({download / 1e9:.2f} GB) and the output ({needed / 1e9:.2f} GB) share a disk that "
                "cannot hold both. Free some space, point HF_HOME or output_dir to another disk, or read the models "
                "without a download (--stream-from-hub)."
            ) from error


def download_bytes(plan: MergePlan) -> int:
    """Return the bytes that the merge will download: none if it streams, or if the cache has all files."""
    sources = [part for model in plan.models for part in model.source.parts if is_downloaded(part, plan.args)]
    if not sources:
        return 0
    from hf_frmerge.checkpoints.hub.find import download_size

    return download_size(sources)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
