"""Which precision a device computes fast in."""

import torch


def is_bfloat16_fast(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bfloat16 about as fast as in 32 bits, or faster.

    PyTorch has fast bfloat16 products for x86 processors with AVX-512. On others, such as most desktop processors,
    they can be fifty times slower than products in 32 bits. GPUs before Ampere only emulate bfloat16.
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability() == "AVX512"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
