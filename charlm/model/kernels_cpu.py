"""The fastest matrix product in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW_ROWS = 16
"""Below so many rows the CPU's "highest" path is the faster one, above it "medium"."""


@contextmanager
def exact_matmul(device: torch.device, num_rows: int = FEW_ROWS) -> Iterator[None]:
    """The fastest product of `num_rows` rows that is fp32 inside; the setting of before is put back after."""
    medium = device.type == "cpu" and num_rows >= FEW_ROWS and medium_is_fp32()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def medium_is_fp32() -> bool:
    """Whether "medium" computes in fp32 on this CPU: it takes bf16 where it finds AMX, and may on other makes."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest torch supported
    return capabilities.get("architecture") == "x86_64" and not any(
        present for name, present in capabilities.items() if name.startswith("amx_")
    )
