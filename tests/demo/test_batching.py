"""Batches without a browser: what is found in files, what is refused, and what the table says."""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")

from demo import batching
from demo.asking import Asking
from demo.batch_tab import bar, table_of
from demo.batching import Batch, BatchError, Row, run, shown_name, to_csv, to_jsonl
from multimodal.images import MAX_BYTES, ImageError
from multimodal.model import ModelError, MultiModalModel


@pytest.fixture(scope="module")
def asking(tiny_folder: Path) -> Asking:
    model = MultiModalModel.from_pretrained(tiny_folder, dtype=torch.float32)
    asking = Asking(lambda: model)
    asking.start()
    asking.wait()
    return asking


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(stream, format="PNG")
    return stream.getvalue()


def pack(path: Path, **files: bytes) -> Path:
    return pack_names(path, {name.replace("__", "/"): data for name, data in files.items()})


def pack_names(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def names(*paths: Path) -> list[str]:
    with Batch(paths) as batch:
        return [entry.name for entry in batch.entries]


def ask(asking: Asking, batch: Batch, *, session: str = "me") -> Iterator[Row | None]:
    number = asking.new_question(session)
    return run(asking, session, number, batch.entries, "What is this?", max_new_tokens=4)


# ---- what is found


def test_folders_and_what_systems_leave_in_them(tmp_path: Path) -> None:
    archive = pack_names(
        tmp_path / "shop.zip",
        {
            "shop/fruit/apple.png": png(),
            "shop/fruit/": b"",
            "shop/.DS_Store": b"x",
            "__MACOSX/shop/fruit/._apple.png": b"x",
            "shop/Thumbs.db": b"x",
            "shop/pear.png": png("green"),
        },
    )
    (tmp_path / "plum.png").write_bytes(png("blue"))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    found = names(archive, tmp_path / "plum.png", tmp_path / ".DS_Store")
    assert found == ["shop/fruit/apple.png", "shop/pear.png", "plum.png"]


def test_names_lead_nowhere(tmp_path: Path) -> None:
    files = {"../../etc/passwd.png": png(), "/top/a.png": png(), "..\\..\\b.png": png(), "C:\\c.png": png()}
    before = set(tmp_path.parent.rglob("*"))
    with Batch([pack_names(tmp_path / "evil.zip", files)]) as batch:
        assert all(entry.read() == png() for entry in batch.entries)
        assert [entry.name for entry in batch.entries] == ["etc/passwd.png", "top/a.png", "b.png", "C:/c.png"]
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "evil.zip"}, "nothing is unpacked onto the disk"
    assert shown_name("a\n\x1b[31m.png") == "a??[31m.png" and shown_name("../..") == "?"


def test_too_many_pictures_are_refused(tmp_path: Path) -> None:
    archive = pack_names(tmp_path / "many.zip", {f"{number}.png": b"" for number in range(11)})
    with pytest.raises(BatchError, match="more than 10 files: make batches"):
        Batch([archive], most=10)
    assert len(names(archive)) == 11


def test_a_listing_that_would_fill_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack_names(tmp_path / "many.zip", {f"{number:0100}.png": b"" for number in range(300)})
    monkeypatch.setattr(batching, "LARGEST_LISTING", 20_000)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # it is never opened
    with pytest.raises(BatchError, match=r"many\.zip lists too many files"):
        Batch([archive])


def test_a_listing_that_hides_its_length_is_not_read(tmp_path: Path) -> None:
    archive = pack(tmp_path / "zip64.zip", a=png())
    data = bytearray(archive.read_bytes())
    struct.pack_into("<I", data, data.rfind(batching.END) + 12, 0xFFFFFFFF)  # "see the zip64 record"
    archive.write_bytes(data)
    with pytest.raises(BatchError, match="lists too many files"):
        Batch([archive])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"not at all" * 20])
def test_what_is_no_zip_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.zip").write_bytes(content)
    with pytest.raises(BatchError, match=r"broken\.zip cannot be read as a zip file .*: pack it again"):
        Batch([tmp_path / "broken.zip"])


def test_files_without_pictures_and_files_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="no picture in these files"):
        Batch([pack_names(tmp_path / "empty.zip", {"__MACOSX/a.png": b"x", ".hidden/b.png": b"x"})])
    with pytest.raises(BatchError, match=r"gone\.png is here no more"):
        Batch([tmp_path / "gone.png"])


# ---- bombs


def test_a_picture_is_unpacked_no_farther_than_it_would_be_read(tmp_path: Path) -> None:
    archive = pack(tmp_path / "bomb.zip", bomb=bytes(MAX_BYTES + 10**7))
    assert archive.stat().st_size < 10**6
    with Batch([archive]) as batch:
        assert len(batch.entries[0].read()) == MAX_BYTES + 1


def test_what_comes_out_of_all_is_limited(tmp_path: Path, asking: Asking) -> None:
    padded = png() + bytes(10_000)
    archive = pack_names(tmp_path / "bomb.zip", {f"{number}.png": padded for number in range(4)})
    with Batch([archive], unpacked=15_000) as batch:
        rows = [row for row in ask(asking, batch) if row]
    assert [bool(row.error) for row in rows] == [False, False, True, True]
    assert rows[2].error == (
        "file '2.png' is not unpacked: over 15,000 bytes came out of the zip files already. Make smaller batches."
    )


def test_a_size_that_lies_is_not_believed(tmp_path: Path) -> None:
    archive = pack(tmp_path / "lie.zip", big=bytes(100_000))
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.find(signature) + offset, 10)
    archive.write_bytes(data)
    with Batch([archive]) as batch, pytest.raises(ImageError, match="cannot be unpacked"):
        batch.entries[0].read()


# ---- asking


def test_a_bad_picture_has_a_row_with_its_error_and_the_rest_goes_on(tmp_path: Path, asking: Asking) -> None:
    inner = pack(tmp_path / "inner.zip", a=png()).read_bytes()
    files = {"a.png": png(), "b.png": png()[:40], "c.txt": b"notes", "d.zip": inner, "e.png": png("blue")}
    archive = pack_names(tmp_path / "mixed.zip", files)
    data = bytearray(archive.read_bytes())
    data[data.find(b"c.txt") + 5] ^= 0xFF  # in its compressed bytes
    archive.write_bytes(data)
    with Batch([archive]) as batch:
        rows = [row for row in ask(asking, batch) if row]
    assert [row.picture for row in rows] == list(files)
    assert [bool(row.answer) for row in rows] == [True, False, False, False, True]
    assert "'b.png' is damaged or cut short" in rows[1].error
    assert "'c.txt' cannot be unpacked" in rows[2].error
    assert "'d.zip' is a ZIP archive or an office document, not a picture" in rows[3].error
    assert all(row.question == "What is this?" for row in rows)
    assert rows[0].confidence is not None and 0 <= rows[0].confidence <= 1 and rows[0].seconds is not None


def test_a_zip_file_with_a_password_says_so(tmp_path: Path) -> None:
    archive = pack(tmp_path / "locked.zip", a=png())
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1  # encrypted
    archive.write_bytes(data)
    with Batch([archive]) as batch, pytest.raises(ImageError, match="Pack it without a password"):
        batch.entries[0].read()


def test_a_batch_ends_when_it_is_cancelled_or_another_begins(tmp_path: Path, asking: Asking) -> None:
    archive = pack_names(tmp_path / "some.zip", {f"{number}.png": png() for number in range(5)})
    with Batch([archive]) as batch:
        rows = ask(asking, batch)
        yours = ask(asking, batch, session="you")
        assert next(rows) and next(yours)
        asking.stop("me")
        assert list(rows) == []
        again = ask(asking, batch)
        assert len(list(yours)) == 4 and len(list(again)) == 5


def test_without_a_model_there_is_an_error(tmp_path: Path) -> None:
    def fail() -> MultiModalModel:
        raise ModelError("there is no such model")

    (tmp_path / "a.png").write_bytes(png())
    asking = Asking(fail)
    with Batch([tmp_path / "a.png"]) as batch:
        rows = ask(asking, batch)
        assert next(rows) is None, "it is still loading"
        asking.start()
        with pytest.raises(ModelError, match="no such model"):
            list(rows)


# ---- the table

ROWS = (
    Row("a.png", "What?", 'say "hi", 你好', 0.61234, 1.5),
    Row("b.png", "What?", error="it is broken"),
    Row("=cmd.png", "-1+1", "@SUM(A1)", 1.0, 0.0),
)


def test_csv_holds_the_table_and_no_formulas() -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert list(read[0]) == ["picture", "question", "answer", "confidence", "seconds", "error"]
    assert read[0]["answer"] == 'say "hi", 你好' and read[0]["confidence"] == "0.61234"
    assert read[1]["confidence"] == "" and read[1]["error"] == "it is broken"
    assert (read[2]["picture"], read[2]["question"], read[2]["answer"]) == ("'=cmd.png", "'-1+1", "'@SUM(A1)")


def test_jsonl_holds_the_table_as_it_is() -> None:
    read = [Row(**json.loads(line)) for line in to_jsonl(ROWS).splitlines()]
    assert tuple(read) == ROWS


def test_the_table_and_the_bar_as_html() -> None:
    evil = Row("<script>", "?", "<b>bold</b>", 0.5, 0.1, "")
    text = table_of([*ROWS, evil])
    assert text.count("<tr") == 5 and "class=failed" in text and "61 %" in text
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text
    assert table_of([]) == "" and "图片" in table_of(ROWS, "zh")
    assert 'max="4" value="1"' in bar(1, 4, "1 of 4") and "1 of 4" in bar(1, 4, "1 of 4")
