"""Plain ATen ops in ONNX: what no pass has made an op of the dialect. What has no lowering is not in the table."""

from __future__ import annotations

from .aten_arithmetic import ARITHMETIC
from .aten_reductions import REDUCTIONS
from .aten_sources import SIZES, SOURCES
from .aten_views import VIEWS
from .lower import Table

ATEN: Table = {**VIEWS, **ARITHMETIC, **REDUCTIONS, **SOURCES, **SIZES}
