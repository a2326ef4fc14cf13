"""What must be known of Ultralytics' own modules by name, because no exported graph shows it.

A new module of Ultralytics that keeps a size as an attribute belongs here, and in `compress/pruning/attributes.py`,
which sets that attribute anew after a cut. Without an entry its channels are frozen or tried out, never cut wrongly.
"""

from __future__ import annotations

# They split by sizes that they keep as attributes: into parts that must stay equal, or into parts of any size.
EQUAL_SPLITS = {"C2f", "C2PSA", "PSA", "RepNCSPELAN4"}
FREE_SPLITS = {"CBLinear", "Attention"}
# Their reshape keeps the length of a row and lets the number of rows shrink: attention by whole heads.
WHOLE_ROWS = {"AAttn"}
# Their reshapes were tried at many widths by the tests, so that no trial is needed for them.
TRIED = {
    *("Detect", "v10Detect", "Segment", "Segment26", "Pose", "Pose26", "OBB", "OBB26", "Classify", "Proto", "Proto26"),
    *("C2f", "C3k2", "C2fCIB", "C2PSA", "PSA", "C2fPSA", "RepNCSPELAN4", "ELAN1", "ADown", "Attention", "AAttn"),
    *("A2C2f", "CBLinear", "CBFuse", "Focus"),
}
