"""The report of a comparison: one HTML file that can be sent to anybody, Markdown for a repository, CSV for a notebook.

What it does not know: how answers were made or scored. What always holds: every figure comes from ``summary.py``, and
nothing that a pipeline, a data set or a server said is ever taken for HTML, a script or a formula.
"""

from multimodal.compare.report.markdown import readme_table
from multimodal.compare.report.write import write_report

__all__ = ["readme_table", "write_report"]
