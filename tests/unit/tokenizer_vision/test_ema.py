"""The average of the weights: its formula, its start, what it leaves behind."""

import pytest
import torch
from torch import nn

from tokenizer_train.vision.ema import WeightAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_average_follows_the_formula():
    live = network()
    average = WeightAverage(live, 0.5)
    expected = {name: tensor.double() for name, tensor in live.state_dict().items()}
    for step in range(1, 12):
        with torch.no_grad():
            for tensor in live.parameters():
                tensor += torch.randn_like(tensor)
        live(torch.randn(5, 3))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in live.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    saved = average.state_dict()
    assert saved["1.num_batches_tracked"] == 11
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(saved[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_network_computes_with_the_average_only_while_asked():
    live = network().eval()
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    average = WeightAverage(live, 0.9)
    start = live(torch.ones(1, 3)).detach()
    live(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    moved = live(torch.ones(1, 3)).detach()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(live(torch.ones(1, 3)), start) and not torch.equal(moved, start)
        raise KeyError
    assert torch.equal(live(torch.ones(1, 3)), moved)
    optimizer.step()
    assert not torch.equal(live(torch.ones(1, 3)), moved), "the optimizer still holds the network's own weights"


def test_saved_average_comes_back():
    live = network()
    average = WeightAverage(live, 0.9)
    saved = {name: tensor + 1 for name, tensor in average.state_dict().items()}
    average.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in average.state_dict().items())
    with pytest.raises(RuntimeError, match="0.bias is in one"):
        average.load_state_dict({name: tensor for name, tensor in saved.items() if name != "0.bias"})
