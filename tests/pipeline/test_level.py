import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_spdy.pipeline.level import DENSE, Level, LevelError, levels_for, mixes_precisions


def test_text_and_value_are_inverses() -> None:
    for pattern in ("unstructured", "block4", "blockout4", "2:4", "1:4", "channels", "channels+int8"):
        for level in levels_for(pattern):
            assert Level.parse(str(level)) == level
    assert str(Level("unstructured", 0.87)) == "unstructured@0.8700"


@given(st.text(max_size=20))
def test_any_text_is_a_level_or_a_value_error(text: str) -> None:
    try:
        assert Level.parse(str(Level.parse(text))) == Level.parse(text)
    except ValueError as exc:
        assert str(exc)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dense@0.5",
        "unstructured",
        "unstructured@0",
        "unstructured@1",
        "4:2",
        "2:0",
        "block8@0.5",
        "blockout3@0.5",
        "int8@0.5",
        "channels+int8",
        "channels+int8@0",
        "channels+int4@0.5",
        "int8+channels@0.5",
    ],
)
def test_nonsense_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"level|pattern|sparsity"):
        Level.parse(text)


def test_the_grid_is_dense_and_41_sparsities_with_equal_shares_removed() -> None:
    levels = levels_for("unstructured")
    kept = 1 - np.array([level.sparsity for level in levels[1:]])
    assert levels[0] == DENSE
    assert len(levels) == 42
    assert (kept[0], kept[-1]) == pytest.approx((0.6, 0.01))
    assert np.allclose(kept[1:] / kept[:-1], 1 - 0.0973, atol=6e-3)  # to 4 decimals


def test_zeros_is_the_nearest_count() -> None:
    assert Level("unstructured", 0.5).zeros(10) == 5
    assert Level("unstructured", 0.99).zeros(1000) == 990
    assert DENSE.zeros(1000) == 0


def test_patterns_joined_by_commas_make_one_rising_list() -> None:
    levels = levels_for("unstructured,2:4,1:4")
    assert levels[0] == DENSE
    assert len(levels) == 44
    assert {level.pattern for level in levels} == {"dense", "unstructured", "2:4", "1:4"}
    assert all(one.sparsity <= other.sparsity for one, other in itertools.pairwise(levels))
    with pytest.raises(ValueError, match="names one twice"):
        levels_for("2:4, 2:4")


def test_widths_in_int8_are_those_in_floating_point_and_the_whole_network_is_in_int8_too() -> None:
    levels = levels_for("channels+int8")
    assert [level.sparsity for level in levels] == [level.sparsity for level in levels_for("channels")]
    assert [str(levels[0]), str(levels[10])] == ["int8", "channels@0.2500+int8"]
    assert all(level.is_int8 for level in levels)
    assert [level.is_whole for level in levels] == [True] + [False] * 40
    assert [level.is_width for level in levels] == [False] + [True] * 40
    assert str(levels[-1]) == "channels@1.0000+int8"
    assert not any(level.is_int8 for level in levels_for("channels"))


@pytest.mark.parametrize(
    "pattern", ["channels+int8,2:4", "channels,channels+int8", "unstructured,channels+int8", "int8,2:4"]
)
def test_widths_and_others_at_once_are_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(LevelError) as caught:
        levels_for(pattern)
    assert str(caught.value) == (
        f"pattern {pattern!r}: widths, int8 and zeros are searched one kind at a time; name one; for zeros in a "
        "narrow network run again on its model.onnx"
    )


def test_int8_is_a_choice_for_each_layer() -> None:
    assert levels_for("int8") == (DENSE, Level("int8", 0.0))
    assert mixes_precisions(levels_for("int8"))
    assert not any(mixes_precisions(levels_for(one)) for one in ("channels+int8", "channels", "2:4", "unstructured"))


@pytest.mark.parametrize("pattern", ["dense"])
def test_a_pattern_in_which_nothing_is_removed_is_no_search(pattern: str) -> None:
    with pytest.raises(LevelError, match=f"^pattern '{pattern}' leaves nothing to choose; use "):
        levels_for(pattern)
