"""Part gpt2: GPT2-MoE-Small (Table 8), one training step at its own shape: tokens/s, MFU, peak memory."""

from statistics import median
from typing import Any

import torch

from scmoe.experiments.bench.gpu.gpu_models import GPT2_MOE_SMALL, tiny
from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.bench.gpu.timing import in_turn
from scmoe.experiments.bench.gpu.train_step import TrainStep
from scmoe.experiments.engine.profiles import peak_bytes
from scmoe.footprint.memory import rank_memory
from scmoe.footprint.model_cost import forward_flops, training_flops
from scmoe.footprint.peak import peak_tflops
from scmoe.training.assembly.model import build_model_on_meta

BATCHES = (64, 32, 16, 8, 4, 2, 1)  # samples of a step: the most that fit
ROOM = 0.75  # of the free memory, for the estimate


def pieces(place: Place) -> Pieces:
    return {"training step": lambda: measure_step(place)}


def measure_step(place: Place) -> dict[str, Any]:
    """Returns rates of a step, medians over rounds. MFU is training FLOPs (footprint/model_cost.py) over what the device could
    do: by its datasheet, and by a product of two large bf16 matrices that is measured in turn with the step."""
    device, config = place.torch_device, tiny(GPT2_MOE_SMALL) if place.tiny else GPT2_MOE_SMALL
    seq_len, model = config.data.seq_len, build_model_on_meta(config)
    given: dict[str, Any] = dict(seq_len=seq_len, precision="bf16-mixed", ep_size=1, dp_size=1, recompute=False)

    def estimated(samples: int) -> dict[str, int]:
        return rank_memory(model, samples=samples, on_gpu=device.type == "cuda", **given)

    samples = 2
    if not place.tiny:
        free = ROOM * torch.cuda.mem_get_info(device)[0]
        samples = next(n for n in BATCHES if estimated(n)["total"] < free or n == BATCHES[-1])
    step = TrainStep(config, device, samples, config.moe.capacity_factor)
    size = 256 if place.tiny else 8192
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = in_turn(device, {"step": step, "product": lambda: square @ square}, 3 if place.tiny else 10)
    seconds = median(times["step"]) / 1e3
    product_flops = 2 * size**3 / (median(times["product"]) / 1e3)
    achieved = samples * training_flops(forward_flops(model, seq_len, empty_slots=False)) / seconds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = peak_tflops(name, "bf16-mixed")
    estimate = estimated(samples)
    peak = step.held_bytes() + peak_bytes(device, step)
    return {
        "samples": samples,
        "seq_len": seq_len,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": samples * seq_len / seconds,
        "tflops_per_s": achieved / 1e12,
        "mfu_of_datasheet": None if sheet is None else achieved / (1e12 * sheet),
        "mfu_of_measured_product": achieved / product_flops,
        "product_tflops_per_s": product_flops / 1e12,
        "peak_bytes": peak,
        "estimated_bytes": estimate["total"],
        "peak_over_estimate": peak / estimate["total"],
        "estimate": estimate,
    }
