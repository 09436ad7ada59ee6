from __future__ import annotations

from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments


def test_try(family, tmp_path, cache):
    record = MergeComparison(family.experts, family.texts, family.base, args=MergingArguments(output_dir=str(tmp_path / "c")), cache_dir=str(cache), max_tokens=400, on_progress=print).run()
    import json
    print(json.dumps(record.to_dict(), indent=1))
