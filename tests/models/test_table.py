"""docs/models.md says what the tests of the families check."""

import re
from pathlib import Path

import pytest

from .families import FAMILIES

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    if re.match(r"\|.*\d+ / \d+", line)
]


def test_the_table_is_that_of_the_families() -> None:
    assert [row[0] for row in ROWS] == [family.name for family in FAMILIES], "run python docs/make_models.py"
    for row, family in zip(ROWS, FAMILIES, strict=True):
        if family.library in ("transformers", "timm"):
            pytest.importorskip(family.library)
        model, _ = family.build()
        ffn, projections = family.feed_forward(model), family.projections(model)
        both = ffn + projections
        assert row[2] == f"{len(family.expected(model, ffn))} / {len(ffn)}", family.name
        assert row[3] == f"{len(family.expected(model, both))} / {len(both)}", family.name
        assert row[4] == ("yes" if family.fullgraph else "no"), family.name
