"""Studies, peers and helpers beside the product; each says in its first lines how it is started."""

import compress  # noqa: F401  (says in one line which packages are missing, before a script imports them)
