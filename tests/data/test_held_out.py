"""Held-out pictures: the same ones in every run, by their content alone."""

from pathlib import Path

from multimodal.data import Sample
from multimodal.data.held_out import HELD_OUT_SHARE, is_held_out, split_held_out


def pictures(folder: Path, count: int = 400) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(f"picture {number}".encode())
    return paths


def test_content_decides(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    held = [is_held_out(path) for path in paths]
    assert 0.02 < sum(held) / len(held) < 0.09 and HELD_OUT_SHARE == 0.05
    again = tmp_path / "again"
    again.mkdir()
    assert [is_held_out(path) for path in pictures(again)] == held
    assert not any(is_held_out(path, 0) for path in paths) and all(is_held_out(path, 1) for path in paths)
    more = [is_held_out(path, 0.5) for path in paths]
    assert all(larger or not smaller for smaller, larger in zip(held, more, strict=True))


def test_a_sample_is_held_out_with_any_of_its_pictures(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    out = next(path for path in paths if is_held_out(path))
    kept = next(path for path in paths if not is_held_out(path))
    samples = [Sample("a", "", (kept,)), Sample("b", "", (kept, out)), Sample("c", ""), Sample("d", "", (out,))]
    one, other = split_held_out(samples)
    assert [sample.question for sample in one] == ["a", "c"]
    assert [sample.question for sample in other] == ["b", "d"]
    assert split_held_out(samples, 0) == (samples, [])
