"""The table of the study of repairs."""

from __future__ import annotations

from scripts.studies.repair import table


def test_a_line_for_each_candidate_and_a_column_for_each_share() -> None:
    def row(macs_share: float, kept: str, **scores: float) -> dict:
        return {"macs_share": macs_share, "importance": "taylor", "map50_95": scores, "kept": kept}

    rows = [
        row(0.52, "folded", as_cut=0.1, folded=0.21234, folded_statistics=0.05),
        row(0.71, "as_cut", as_cut=0.4, folded=0.3, folded_statistics=0.5),
    ]
    assert table({"dense_map50_95": 0.6, "rows": rows}).splitlines() == [
        "|  | 52% of the MACs, taylor | 71% of the MACs, taylor |",
        "| --- | --: | --: |",
        "| as_cut | 0.1000 | 0.4000 (kept) |",
        "| folded | 0.2123 (kept) | 0.3000 |",
        "| folded_statistics | 0.0500 | 0.5000 |",
        "| uncut | 0.6000 | 0.6000 |",
    ]
