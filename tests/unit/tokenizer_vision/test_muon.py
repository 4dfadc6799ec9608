"""Muon of kernels beside torch's Muon of matrices, one after the other."""

import torch
from torch import nn

from megatron_ext.vision import MoVQGAN
from megatron_ext.vision.shape import VisionTokenizerConfig
from tokenizer_train.vision.config import VisionOptimConfig
from tokenizer_train.vision.muon import Muon, orthogonalized
from tokenizer_train.vision.optimizer import NetworkOptimizer

SHAPES = ((32, 16, 3, 3), (32, 16, 3, 3), (48, 16, 1, 1), (16, 64, 3, 3, 3), (16, 16, 1, 1))
SCHEDULE = {"lr": 0.1, "min_lr": 0.02, "lr_warmup_steps": 2, "weight_decay": 0.5, "clip_grad": 0.0}


def test_kernels_are_stepped_as_torch_steps_matrices():
    torch.manual_seed(0)
    kernels = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for kernel in kernels[::2]:
        if kernel.ndim == 4:
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    ours = Muon(kernels, lr=0.1, weight_decay=0.5)
    theirs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        before = [matrix.detach().clone() for matrix in matrices]
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 0.1 / (step + 1)
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.grad = torch.randn_like(kernel)
            matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        for kernel, matrix, start in zip(kernels, matrices, before, strict=True):
            # torch's iterates in bfloat16, ours in float32: 0.0068 of the step apart at most.
            assert (kernel.flatten(1) - matrix).norm() < 0.012 * (matrix - start).norm()
            kernel.data.copy_(matrix.view(kernel.shape))


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(2, 40, 24))[0], torch.linalg.qr(torch.randn(2, 60, 24))[0]
    sizes = torch.logspace(0, -2, 24)
    matrices = (u * sizes) @ v.mT
    for found in (orthogonalized(matrices), orthogonalized(matrices.mT).mT):
        along = (u.mT @ found @ v).diagonal(dim1=1, dim2=2)
        assert 0.65 < along.min() and along.max() < 1.2  # 0.68 and 1.13
        # Nothing else is added but float32's rounding, 7.3e-6 of the length.
        assert (found - (u * along.unsqueeze(1)) @ v.mT).norm() < 3e-5 * found.norm()


def test_kernel_without_gradient_stays():
    kernels = [nn.Parameter(torch.ones(16, 16, 3, 3)) for _ in range(2)]
    kernels[0].grad = torch.randn(16, 16, 3, 3)
    Muon(kernels, lr=0.1, weight_decay=0.5).step()
    assert not torch.equal(kernels[0], torch.ones(16, 16, 3, 3))
    assert torch.equal(kernels[1], torch.ones(16, 16, 3, 3))


def test_it_takes_the_kernels_between_hidden_layers():
    model = MoVQGAN(VisionTokenizerConfig(codebook_size=8, ch=32, ch_mult=(1, 2), attn_resolutions=(1,)))
    scaled = {"decoder.up.0.block.0.conv1.weight": 0.5}
    optimizer = NetworkOptimizer(model, VisionOptimConfig(optimizer="muon", **SCHEDULE), 10, units=scaled)
    names = {id(weight): name for name, weight in model.named_parameters()}
    taken = {names[id(weight)] for weight in optimizer.muon.param_groups[0]["params"]}
    left = [names[id(weight)] for group in optimizer.adam.param_groups for weight in group["params"]]
    assert sorted([*taken, *left]) == sorted(names.values())
    hidden = ("conv1.weight", "conv2.weight", "nin_shortcut.weight", "sample.conv.weight", ".q.weight", ".k.weight")
    hidden += (".v.weight", "proj_out.weight")
    assert taken == {name for name in names.values() if name.endswith(hidden)} - scaled.keys()
    assert not any("time_" in name or "conv_y" in name for name in taken)


def test_one_schedule_moves_both_and_a_resume_goes_on():
    def stepped(network: nn.Module, optimizer: NetworkOptimizer, steps: range) -> list[torch.Tensor]:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for weight in network.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step(step)
        return [weight.detach().clone() for weight in network.parameters()]

    def made() -> tuple[nn.Module, NetworkOptimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
        return network, NetworkOptimizer(network, VisionOptimConfig(optimizer="muon", **SCHEDULE), 10)

    network, optimizer = made()
    halfway = stepped(network, optimizer, range(1, 6))
    saved = optimizer.state_dict()
    saved_muon = {name: value.clone() for name, value in saved["muon"]["state"][0].items()}
    assert saved_muon.keys() == {"momentum_buffer"}
    whole = stepped(network, optimizer, range(6, 9))
    assert optimizer.muon.param_groups[0]["lr"] == optimizer.adam.param_groups[0]["lr"] == optimizer.learning_rate(8)
    again, resumed = made()
    stepped(again, resumed, range(1, 6))
    other, fresh = made()
    for weight, there in zip(other.parameters(), halfway, strict=True):
        weight.data.copy_(there)
    fresh.load_state_dict(resumed.state_dict())
    assert all(map(torch.equal, stepped(other, fresh, range(6, 9)), whole))
