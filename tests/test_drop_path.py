"""Drop path of timm's models: each sample's draws are its own, at timm's rate; weights and evaluation are as before."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from hcnet_cli.models import backbone
from hcnet_cli.models.drop_path import Draws, KeyedDropPath, keyed_drop_path
from hcnet_cli.rng import keyed_uniform

SMALL = {  # small ones of a family, for images of 32 x 32 pixels
    "convnext_atto": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]},
    "swin_tiny_patch4_window7_224": {
        "window_size": 4, "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]
    },
    "vit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "resnet10t": {},
    "focalnet_tiny_srf": {},
    "mambaout_femto": {},
    "pvt_v2_b0": {},
    "efficientnet_b0": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_every_drop_path_is_keyed(name: str) -> None:
    """In `pretrain` and for the heads; the weights keep timm's names, and evaluation its numbers."""
    model = backbone.create(name, 3, SMALL[name], drop_path_rate=0.5, img_size=32).eval()
    sized = {"img_size": 32} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    plain = timm.create_model(name, num_classes=3, drop_path_rate=0.5, **SMALL[name], **sized).eval()
    used: list[nn.Module] = []
    for path in plain.modules():
        if isinstance(path, DropPath) and path.drop_prob:
            path.register_forward_hook(lambda path, *_: used.append(path))
    with torch.no_grad():
        plain(torch.zeros(1, 3, 32, 32))
    assert used
    assert sum(isinstance(one, KeyedDropPath) for one in model.modules()) == len(used) == model.drop_path_draws.rows
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    maps = backbone.create(name, 0, SMALL[name], drop_path_rate=0.5)
    assert maps.num_blocks > 0
    assert maps.num_blocks == sum(isinstance(one, KeyedDropPath) for one in maps.modules())


def test_draws_are_the_samples_own() -> None:
    """Two halves of a batch give what the batch gives, in training; other keys give something else."""
    model = backbone.create("convnext_atto", 3, SMALL["convnext_atto"], drop_path_rate=0.5, img_size=32).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # ConvNeXt's layer scale would hide its blocks
    model = copy.deepcopy(model)  # as EMA copies it: the draws stay those of the copy
    draws = model.drop_path_draws
    x, keys = torch.randn(6, 3, 32, 32), torch.arange(6)

    def outputs(*parts: slice) -> torch.Tensor:
        made = []
        for part in parts:
            draws.noise = keyed_uniform(keys[part], draws.rows)
            made.append(model(x[part]))
        return torch.cat(made)

    whole = outputs(slice(None))
    torch.testing.assert_close(outputs(slice(2), slice(2, None)), whole)
    keys += 100
    assert not torch.allclose(outputs(slice(None)), whole)


def test_rate_and_scale_are_timms() -> None:
    x = torch.ones(20_000, 2)
    for scale in (True, False):
        draws = Draws()
        path = KeyedDropPath(DropPath(0.3, scale), draws).train()
        draws.noise = keyed_uniform(torch.arange(len(x)), 1)
        made = path(x)
        kept = made[:, 0] > 0
        assert kept.float().mean() == pytest.approx(0.7, abs=0.02)
        torch.testing.assert_close(made[kept], torch.full_like(made[kept], 1 / 0.7 if scale else 1.0))
        assert torch.equal(path.eval()(x), x)
        draws.noise = None  # a caller without keys: as in timm
        torch.manual_seed(0)
        by_hand = DropPath(0.3, scale).train()(x)
        torch.manual_seed(0)
        assert torch.equal(path.train()(x), by_hand)


class _Odd(nn.Module):
    """Calls its drop path twice, or on windows of the image."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.path, self.windows = DropPath(0.5), windows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.path(x.reshape(4, -1)).reshape(x.shape) if self.windows else self.path(self.path(x))


@pytest.mark.parametrize("windows", [True, False])
def test_drop_path_that_no_row_of_draws_would_fit_stays_timms(windows: bool) -> None:
    model = _Odd(windows)
    with keyed_drop_path(model) as draws:
        model(torch.zeros(1, 4))
    assert draws.rows == 0
    assert type(model.path) is DropPath
