import torch

from onnx_spdy.pipeline.database.matmul import fast_float32


def test_fast_products_lose_no_more_than_float32() -> None:
    left, right = (torch.randn(200, 300, generator=torch.Generator().manual_seed(n)) for n in range(2))
    exact = left.double() @ right.double().T
    with fast_float32():
        product = left @ right.T
    assert float((product - exact).norm() / exact.norm()) < 1e-5


def test_the_precision_that_others_chose_comes_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before
