"""One self-contained HTML report of a run folder."""

from biosae.reports.report import report

__all__ = ["report"]
