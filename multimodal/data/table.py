"""A user's own questions as a table: CSV with a picture, a question and an answer in each row.

    image,question,answer
    xray.png,What is abnormal?,Cardiomegaly
    before.png; after.png,What has changed?,The effusion is gone

The header names the columns in any order; pictures alone with a label ask `What is this?`. A spreadsheet that saves
semicolons or tabs between its columns is read too. Further columns are kept in `Sample.meta`. A row that lacks
something is an error, never left out.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from multimodal.data.sample import DataError, RowError, Sample, local_picture, read_lines, row

COLUMNS = {
    "image": ("image", "images", "picture", "file", "path"),
    "question": ("question", "prompt"),
    "answer": ("answer", "label", "class"),
}
QUESTION = "What is this?"
EXAMPLE = "Name the columns in the first line: image,question,answer"


def read_csv(
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    question: str | None = QUESTION,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads a CSV file of questions about pictures.

    Args:
        path: The file, UTF-8, with a header. Columns are `image` (or picture, file, path), `question` (or prompt) and
            `answer` (or label, class); several pictures in one cell stand between semicolons.
        image_folder: What relative picture paths are relative to; the file's own folder where not given.
        question: What is asked where the file has no column of questions. With `None` it must have one.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per row, in the file's order, with the row's own `id` or else `name:line`.

    Raises:
        DataError: The file is missing, isn't UTF-8 or lacks a column, or (without `skip_bad`) a row has too many or too
            few cells, an empty one, or names a picture that isn't there.
    """
    return list(iterate_csv(path, image_folder, question=question, skip_bad=skip_bad))


def iterate_csv(
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    question: str | None = QUESTION,
    skip_bad: list[DataError] | None = None,
) -> Iterator[Sample]:
    """Yields what `read_csv` returns, row by row: the file may be larger than memory."""
    file = Path(path)
    folder = file.parent if image_folder is None else Path(image_folder)
    lines = read_lines(file, remedy="Give the path of a CSV file")
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    columns = columns_of(header, file, question)
    reader = csv.reader(lines, delimiter=delimiter)
    start = 2
    for cells in table_rows(reader, file):
        line, start = start, reader.line_num + 2
        if not any(cell.strip() for cell in cells):
            continue
        sample = None
        with row(file, line, skip_bad):
            if len(cells) != len(header):
                remedy = "Put cells that hold a separator between quotation marks"
                raise RowError(f"the header has {len(header)} columns and this row {len(cells)}", remedy)
            sample = sample_of(
                dict(zip(header, cells, strict=True)), columns, folder, question or "", f"{file.stem}:{line}"
            )
        if sample is not None:
            yield sample


def table_rows(reader: Iterator[list[str]], file: Path) -> Iterator[list[str]]:
    """Yields the rows; text that is no CSV at all is an error of the file."""
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", file=file, remedy="Save it again as CSV, UTF-8") from None


def columns_of(header: list[str], file: Path, question: str | None) -> dict[str, str]:
    """Finds the column of each part: the first name of `COLUMNS` that the header has."""
    by_name = {name.lower(): name for name in header}
    if len(by_name) < len(header):
        raise DataError("two columns have the same name", file=file, line=1, remedy="Rename one of them")
    columns = {}
    for part, names in COLUMNS.items():
        if found := [by_name[name] for name in names if name in by_name]:
            columns[part] = found[0]
        elif part != "question" or question is None:
            reason = f"there is no column {' or '.join(names)} among {', '.join(header) or 'nothing'}"
            raise DataError(reason, file=file, line=1, remedy=EXAMPLE)
    return columns


def sample_of(record: dict[str, str], columns: dict[str, str], folder: Path, question: str, default_id: str) -> Sample:
    """Makes a sample of one row."""
    if empty := [column for column in columns.values() if not record[column].strip()]:
        raise RowError(f"the {empty[0]} is empty", "Write it, or delete the row")
    sources = [source.strip() for source in record[columns["image"]].split(";")]
    others = {name: value for name, value in record.items() if name not in (*columns.values(), "id")}
    return Sample(
        question=record[columns["question"]].strip() if "question" in columns else question,
        answer=record[columns["answer"]].strip(),
        images=tuple(local_picture(source, folder) for source in sources if source),
        id=record.get("id", "").strip() or default_id,
        meta=others,
    )
