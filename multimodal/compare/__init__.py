"""The comparison: is the fused model worth it, on my task, with my numbers?"""

from multimodal.compare.results import Results, Row
from multimodal.compare.run import BudgetError, CompareSettings, compare
from multimodal.compare.store import read_results
from multimodal.compare.summary import Figures, Pair, pairs_of, summarise

__all__ = [
    "BudgetError",
    "CompareSettings",
    "Figures",
    "Pair",
    "Results",
    "Row",
    "compare",
    "pairs_of",
    "read_results",
    "summarise",
]
