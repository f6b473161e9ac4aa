"""Files of tensors."""

import pytest
import torch

from charlm.config import UserError
from charlm.runs.tensors import DTYPES, check_model, load_tensors, save_tensors

WHOLE_NUMBERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


def test_every_type_of_a_buffer_is_known(tmp_path):
    """Guards against a task of one's own whose run is saved and cannot be resumed."""
    assert DTYPES.keys() >= WHOLE_NUMBERS | {torch.float32, torch.bool}
    written = {str(dtype): torch.tensor([0, 1, 1], dtype=dtype) for dtype in DTYPES}
    save_tensors(written, tmp_path / "model.safetensors", like=tmp_path)
    check_model(tmp_path / "model.safetensors", written, "config.yaml")
    read = load_tensors(tmp_path / "model.safetensors")
    assert read.keys() == written.keys()
    assert all(read[name].dtype == written[name].dtype and read[name].equal(written[name]) for name in written)
    with pytest.raises(UserError, match=r"its tensor torch.uint8 is U8 \[3\], and that .* I8 \[3\]"):
        other = written | {"torch.uint8": torch.zeros(3, dtype=torch.int8)}
        check_model(tmp_path / "model.safetensors", other, "config.yaml")
