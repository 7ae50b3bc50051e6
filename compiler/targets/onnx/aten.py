"""ATen ops in ONNX, for calls that no pass replaced by an op of the dialect.

Ops without a lowering are not in the table.
"""

from __future__ import annotations

from .aten_arithmetic import ARITHMETIC
from .aten_reductions import REDUCTIONS
from .aten_sources import SIZES, SOURCES
from .aten_views import VIEWS
from .lower import Table

ATEN: Table = {**VIEWS, **ARITHMETIC, **REDUCTIONS, **SOURCES, **SIZES}
