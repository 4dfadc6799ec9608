"""What a preflight measures of a GPU."""

import torch

from megatron_ext.runtime.probe import free_memory_share, matrix_product, software


def test_a_gpu_is_measured(topology):
    tflops, digest = matrix_product(topology.device)
    assert tflops > 10 and matrix_product(topology.device)[1] == digest
    assert 0 < free_memory_share(topology.device) <= 1
    facts = software(topology.device)
    assert torch.cuda.get_device_name(topology.device) in facts["device"] and facts["nccl"]
    assert "none" not in facts["GPUs and driver"]
