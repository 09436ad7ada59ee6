"""What may not be in an output folder, who may write to it, and what of an earlier model may not stay."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_reference import write_family
from tiny_models import save_lora

from hf_frmerge import FisherRaoMerger
from hf_frmerge.checkpoints.lock import LOCK_FILE
from hf_frmerge.checkpoints.writer import STAGING
from hf_frmerge.errors import ArgumentError, MergeError, ResumeError
from hf_frmerge.merging.arguments import MergingArguments
from hf_frmerge.merging.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.planning import build_plan
from hf_frmerge.merging.processes import Processes
from hf_frmerge.merging.run import run_merge
