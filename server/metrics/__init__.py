"""The metrics of a serving process: their names, labels and buckets, what is written into them, and their page.

Prometheus conventions: prefix `lorikeet_`, seconds and bytes, `_total` for counters. Times are observed once a
request, never once a token. Must import neither torch, grpc nor protobuf.
"""

from server.metrics.log_lines import DroppedLogLines
from server.metrics.metrics import Metrics
from server.metrics.page import MetricsPage

__all__ = ["DroppedLogLines", "Metrics", "MetricsPage"]
