"""The report of a run: one HTML page that can be mailed, and its pictures as PNG files."""

from mlip_jax.reports.report import report_workdir, write_report

__all__ = ["report_workdir", "write_report"]
