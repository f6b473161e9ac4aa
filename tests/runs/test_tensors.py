"""Files of tensors."""

import pytest
import torch

from charlm.config import UserError
from charlm.runs.tensors import check_tensors, load_tensors, save_tensors

TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.bfloat16, torch.bool)


def test_buffers_of_every_type_come_back(tmp_path):
    """Guards against a task of one's own whose run is saved and cannot be resumed."""
    path = tmp_path / "model.safetensors"
    written = {str(dtype): torch.tensor([0, 1, 1], dtype=dtype) for dtype in TYPES}
    save_tensors(written, path, like=tmp_path)
    read, _ = load_tensors(path)
    assert all(read[name].dtype == written[name].dtype and read[name].equal(written[name]) for name in written)
    with pytest.raises(UserError, match=r"its tensor torch.uint8 is uint8 \[3\], and that .* int8 \[3\]"):
        check_tensors(path, read, written | {"torch.uint8": torch.zeros(3, dtype=torch.int8)}, "config.yaml")
