"""tools/make_trellis_codebooks.py: where the codebooks and the code of the trellis types come from."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from turboquant import reference

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = pytest.mark.parametrize("bits", [4, 3, 2])


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("trellis_codebooks", ROOT / "tools" / "make_trellis_codebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paths_are_those_of_the_reference(tool):
    """For the code of the format; integer metrics, so that sums are exact. Small ones have many ties."""
    for most in (255, 3):
        metric = np.random.default_rng(most).integers(0, most, (20, 40, 4))  # blocks, steps, subsets
        found = tool.best_subsets(metric.transpose(1, 2, 0).astype(np.float32), tool.CODE)
        np.testing.assert_array_equal(found.T, reference.subsets(reference.best_path(metric)))


@WIDTHS
def test_the_error_is_the_encoders(tool, bits):
    """Without the rounding of metrics and of the stored scale, which cost about 1%."""
    x = tool.normal_blocks(1000, 1)
    back = reference.dequantize(reference.quantize(reference.unrotate(x), f"turbo{bits}_tcq"), f"turbo{bits}_tcq")
    encoder = np.square(back - reference.unrotate(x)).mean()
    assert 0.97 < tool.relative_error(x, tool.published(bits)) / encoder < 1.001


@WIDTHS
def test_the_books_of_the_format_are_what_the_training_leaves(tool, bits):
    """An iteration moves no level by more than 1, and gains next to nothing."""
    book = tool.published(bits)
    better = tool.improve(tool.normal_blocks(3000, 1), book)
    assert better.step == pytest.approx(book.step, rel=0.01)
    assert np.abs(np.rint(better.levels / better.step) - np.rint(book.levels / book.step)).max() <= 1
    fresh = tool.normal_blocks(3000, 2)
    assert tool.relative_error(fresh, better.stored()) > 0.995 * tool.relative_error(fresh, book)


def test_training_approaches_them(tool):
    x, fresh = tool.normal_blocks(512, 1), tool.normal_blocks(1000, 2)
    first, trained, wanted = (
        tool.relative_error(fresh, book) for book in (tool.initial(3), tool.train(3, x, rounds=6), tool.published(3))
    )
    assert trained < 1.02 * wanted < first


def test_a_run_repeats_exactly(tool):
    levels = [tool.train(2, tool.normal_blocks(100, 1), rounds=1).levels for _ in range(2)]
    np.testing.assert_array_equal(*levels)


def test_the_code_is_found_in_the_search(tool):
    """It is one of those in Ungerboeck's form, of which equal ones are left out; and it is better than two others."""
    codes = set(tool.codes(reference.MEMORY))
    symmetric = 7 * 8  # taps that are their own reversal
    assert tool.CODE in codes and len(codes) == (31 * 32 + symmetric) // 2
    x, book = tool.normal_blocks(2000, 1), tool.published(3)
    code, *others = (tool.CODE, tool.Code(6, 0o010, 0o147), tool.Code(6, 0o070, 0o101))
    assert tool.relative_error(x, book, code) < min(tool.relative_error(x, book, other) for other in others)
