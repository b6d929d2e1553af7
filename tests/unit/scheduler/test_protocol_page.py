from __future__ import annotations

import re
from pathlib import Path

from services.common.errors import DjinnError

PAGE = Path(__file__).parents[3] / "docs" / "protocol.md"


def all_errors(root: type[DjinnError] = DjinnError) -> set[type[DjinnError]]:
    return {root}.union(*(all_errors(child) for child in root.__subclasses__()))


def test_the_table_of_errors_is_the_tree_of_errors():
    rows = re.findall(r"^\| ([A-Z_]+) \| `([A-Z_]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    tree = {(error.code, error.reason) for error in all_errors()}
    assert sorted(rows) == sorted(tree)
