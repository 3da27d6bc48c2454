"""What a device computes at its best: the denominator of MFU.

The vendor's numbers for bfloat16 products on tensor cores, dense (data sheets of NVIDIA print the rate with sparsity,
which is twice that). Names are exact, as torch.cuda.get_device_name gives them: variants of one card differ by a third.

    A100   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    H100   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    H200   https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
"""

BF16_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,  # SXM
    "NVIDIA H200 NVL": 835.5,
}


def peak_tflops(device_name: str | None, precision: str) -> float | None:
    """Return the TFLOP/s of a GPU of this name; None where they are not known: another card, float32, a CPU (None).

    Without tensor cores float32 has another peak, and a CPU's depends on its clock, its load and its threads."""
    return BF16_TFLOPS.get(device_name or "") if precision.startswith("bf16") else None
