"""What a person sees in the terminal: tables of results and live progress, in rich.

words.py      text that is safe to print
tables.py     results
progress.py   bars
"""

from kdcache.display.progress import bytes_progress, capture_progress, count_progress, sweep_progress, train_progress
from kdcache.display.tables import (
    capture_plan,
    capture_result,
    chain_result,
    comparison,
    converted,
    edited,
    export_result,
    first_samples,
    metrics,
    summary,
    sweep_result,
    table_of,
    train_result,
    transfer,
    verify_report,
)
from kdcache.display.words import brief, say, size, text

__all__ = [
    "brief",
    "bytes_progress",
    "capture_plan",
    "capture_progress",
    "capture_result",
    "chain_result",
    "comparison",
    "converted",
    "count_progress",
    "edited",
    "export_result",
    "first_samples",
    "metrics",
    "say",
    "size",
    "summary",
    "sweep_progress",
    "sweep_result",
    "table_of",
    "text",
    "train_progress",
    "train_result",
    "transfer",
    "verify_report",
]
