"""The table of docs/many-gpus.md is what its script says."""

from pathlib import Path

from benchmarks.many_gpus import table


def test_the_page_has_the_table_of_its_script(root: Path) -> None:
    assert table() in (root / "docs" / "many-gpus.md").read_text(encoding="utf-8")
