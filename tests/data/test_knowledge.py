"""SLAKE's knowledge graph: triples, their faults, and the real files where they are at hand."""

from pathlib import Path

import pytest

from multimodal.data import DataError, KnowledgeTriple, read_slake_knowledge

HEADER = "disease#attribute#value\r\n"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "KG").mkdir()
    (tmp_path / "KG/en_organ.csv").write_text(
        f'{HEADER}Heart# function#pumps  blood#all day\r\n"\r\n\r\nLung#shape#cone'
    )
    (tmp_path / "KG/zh_disease.csv").write_text(f"{HEADER}肺炎#位置#肺\n", encoding="utf-8")
    return tmp_path


def test_lines_become_triples(graph: Path) -> None:
    heart, lung = read_slake_knowledge(graph, "en")
    assert heart == KnowledgeTriple("Heart", "function", "pumps blood#all day", "en")
    assert lung == KnowledgeTriple("Lung", "shape", "cone", "en")
    assert read_slake_knowledge(graph / "KG")[2:] == [KnowledgeTriple("肺炎", "位置", "肺", "zh")]


@pytest.mark.parametrize("line", ["Lung#shape", "Lung", "Lung##cone", "#shape#cone"])
def test_a_broken_line_is_named(graph: Path, line: str) -> None:
    file = graph / "KG/en_disease.csv"
    file.write_text(f"{HEADER}Mass#location#Lung\n{line}\n")
    with pytest.raises(DataError, match="expected 'subject#attribute#value', got") as caught:
        read_slake_knowledge(graph)
    assert (caught.value.file, caught.value.line) == (file, 3)
    skipped: list[DataError] = []
    assert len(read_slake_knowledge(graph, skip_bad=skipped)) == 4
    assert len(skipped) == 1


def test_no_graph(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.csv of a graph.*Give the folder that holds KG"):
        read_slake_knowledge(tmp_path / "elsewhere")
    (graph / "KG/zh_disease.csv").unlink()
    with pytest.raises(DataError, match=r"no zh_\*\.csv"):
        read_slake_knowledge(graph, "zh")


@pytest.mark.needs_data
def test_the_real_graph(real_data: Path) -> None:
    triples = read_slake_knowledge(real_data / "slake")
    assert len(triples) == 2497
    assert KnowledgeTriple("Alveolar Proteinosis", "location", "Lung", "en") in triples
