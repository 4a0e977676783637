from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onnx_spdy.pipeline.database import matmul
from onnx_spdy.pipeline.database.matmul import fast_float32

needs_setting = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no precision of matrix products"
)


def test_fast_products_lose_no_more_than_float32() -> None:
    left, right = (torch.randn(200, 300, generator=torch.Generator().manual_seed(n)) for n in range(2))
    exact = left.double() @ right.double().T
    with fast_float32():
        product = left @ right.T
    assert float((product - exact).norm() / exact.norm()) < 1e-6  # bfloat16 loses 3e-3, float32 2e-7


@pytest.fixture
def setting() -> Iterator[Any]:
    """torch's setting at another value than its own, so that it has to come back."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield setting
    setting.fp32_precision = before


@needs_setting
@pytest.mark.parametrize("exact", [True, False])
def test_rounding_is_allowed_only_where_nothing_is_rounded_and_only_inside(
    monkeypatch: pytest.MonkeyPatch, setting: Any, exact: bool
) -> None:
    monkeypatch.setattr(matmul, "_is_exact", lambda: exact)
    with fast_float32():
        assert setting.fp32_precision == ("bf16" if exact else "ieee")
    assert setting.fp32_precision == "ieee"


@needs_setting
def test_the_precision_comes_back_after_an_error_too(monkeypatch: pytest.MonkeyPatch, setting: Any) -> None:
    monkeypatch.setattr(matmul, "_is_exact", lambda: True)
    with pytest.raises(ZeroDivisionError), fast_float32():
        raise ZeroDivisionError
    assert setting.fp32_precision == "ieee"
