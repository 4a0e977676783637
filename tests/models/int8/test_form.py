"""Forms of engines, and runtimes that have none."""

import pytest

from onnx_spdy.models.int8.form import FORMS, NoForm, form_for


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_form_is_found_by_its_runtime(name: str) -> None:
    assert form_for(name).name == name


@pytest.mark.parametrize("name", ["deepsparse", "cusparselt"])
def test_a_runtime_without_a_form_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(NoForm) as caught:
        form_for(name)
    assert str(caught.value) == (
        f"{name} can't be given networks in int8; take one of fake, onnxruntime, openvino, tensorrt"
    )
