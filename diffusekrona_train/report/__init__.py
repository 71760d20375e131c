"""The HTML page of a run or an evaluation, its charts, the plot of a run, and the labelled contact sheet.

Importing this needs PIL alone; matplotlib and jinja2 are imported where a page is written.
"""

from __future__ import annotations

from diffusekrona_train.report.curves import write_loss_plot
from diffusekrona_train.report.evaluation import write_evaluation_report
from diffusekrona_train.report.run import write_run_report
from diffusekrona_train.report.sheet import contact_sheet

__all__ = ["contact_sheet", "write_evaluation_report", "write_loss_plot", "write_run_report"]
