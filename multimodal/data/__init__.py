"""Samples to train on and to measure with, and the readers that make them.

A reader takes a folder in its publisher's layout, or a user's own file, and gives a plain list of `Sample`; it needs no
network, decodes no picture and loads no pickle. `read` finds the reader by name, for the command line.
"""

from multimodal.data.boxes import read_boxes
from multimodal.data.clothing import read_clothing
from multimodal.data.grocery import read_grocery, read_grocery_categories, read_grocery_descriptions
from multimodal.data.huggingface import load_samples, sample_from
from multimodal.data.jsonl import read_jsonl
from multimodal.data.sample import Box, DataError, Sample, report_bad
from multimodal.data.scoring import exact_match, normalise_answer
from multimodal.data.slake import KnowledgeTriple, read_slake, read_slake_knowledge
from multimodal.data.sources import iterate, read, splits_of
from multimodal.data.table import read_csv
from multimodal.data.vqa_rad import read_vqa_rad

__all__ = [
    "Box",
    "DataError",
    "KnowledgeTriple",
    "Sample",
    "exact_match",
    "iterate",
    "load_samples",
    "normalise_answer",
    "read",
    "read_boxes",
    "read_clothing",
    "read_csv",
    "read_grocery",
    "read_grocery_categories",
    "read_grocery_descriptions",
    "read_jsonl",
    "read_slake",
    "read_slake_knowledge",
    "read_vqa_rad",
    "report_bad",
    "sample_from",
    "splits_of",
]
