"""Pattern for the names of models and collections."""

from __future__ import annotations

import re

#: Pattern that a whole name must match: 1 to 128 ASCII letters, digits, `.`, `_` and `-`, the first a letter or digit.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
