"""The authors' checkpoints: tensors in their layout give their logits after remapping; other files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hcnet_cli.models import HcNet, remap_official_state_dict
from hcnet_cli.models.literal import ReferenceHcNet

CONFIGURATIONS = {"hcnet_tiny": (5, 5, 14, 5), "hcnet_tiny_release": (3, 8, 18, 3)}
SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 7}


def randomized(model: nn.Module) -> nn.Module:
    """Random everywhere, norms and biases too, so that no mistaken name can hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        scale = 0.7 / fan_in**0.5 if parameter.ndim > 1 else 0.1
        parameter.data = scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(the literal model, ours with the same weights) of one of the two T configurations."""
    official = randomized(ReferenceHcNet(CONFIGURATIONS[request.param]))
    ours = timm.create_model(request.param).eval()
    ours.load_state_dict(remap_official_state_dict(official.state_dict()))  # strict: every tensor finds its place
    return official, ours


# 224 x 224 is the one size the authors' code takes; it refuses the others.
@pytest.mark.parametrize("size", [(224, 224), (97, 66), (8, 8)])
def test_official_weights_give_the_official_logits(pair: tuple[nn.Module, nn.Module], size: tuple[int, int]) -> None:
    official, ours = pair
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = official(x)
        difference = (ours(x) - expected).abs().max().item()
    assert expected.std() > 0.1  # the logits say something
    assert difference <= 1e-4


def small_pair() -> tuple[dict[str, Tensor], HcNet]:
    return randomized(ReferenceHcNet(**SMALL)).state_dict(), HcNet(**SMALL)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_and_buffers_of_training_are_dropped(prefix: str) -> None:
    official, ours = small_pair()
    wrapped = {prefix + name: tensor for name, tensor in official.items()}
    wrapped[prefix + "layers.0.blocks.0.mean_num"] = torch.ones(1, 1, 56, 56)
    expected = remap_official_state_dict(official)
    for checkpoint in (wrapped, {"model": wrapped, "epoch": 299}):
        remapped = remap_official_state_dict(checkpoint)
        assert remapped.keys() == expected.keys() == ours.state_dict().keys()
        assert all(torch.equal(remapped[name], expected[name]) for name in expected)


def test_unknown_names_are_left_for_the_loader_to_report() -> None:
    official, _ = small_pair()
    assert "teacher.weight" in remap_official_state_dict(official | {"teacher.weight": torch.zeros(1)})


def test_timm_loads_a_translated_checkpoint_file(tmp_path: Path) -> None:
    """A local file under this project's names."""
    official = randomized(ReferenceHcNet((2, 2, 4, 2), (32, 64, 128, 160), 1000)).state_dict()
    ours = remap_official_state_dict(official)
    file = str(tmp_path / "ours.safetensors")
    save_file(ours, file)
    model = timm.create_model("hcnet_pico", pretrained=True, pretrained_cfg_overlay={"file": file})
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())


def as_2024_file(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the 2024 single-file HcNet.py: a fixed mean of the neighbours, no learned kernel."""
    tensors = {}
    for name, tensor in official.items():
        if "Anisotropic_conv" in name:
            tensors[name.replace("Anisotropic_conv.weight", "mean_num")] = torch.ones(1, 1, 56, 56)
        else:
            tensors[name.replace("DeltaT_DeltaD", "fc_0").replace("mlp.Filters", "mlp.dwconv")] = tensor
    return tensors


def as_3x3_file(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of HcNet-architecture.py, whose 3x3 stencil has another centre tap."""
    return {
        name.replace("DeltaT_DeltaD", "fc_0"): tensor[..., 1:4, 1:4] if "Anisotropic_conv" in name else tensor
        for name, tensor in official.items()
    }


def test_files_with_another_operator_are_refused() -> None:
    official, _ = small_pair()
    with pytest.raises(ValueError, match="2024"):
        remap_official_state_dict(as_2024_file(official))
    with pytest.raises(ValueError, match="3x3"):
        remap_official_state_dict({"model": as_3x3_file(official)})
    with pytest.raises(ValueError, match="3x3"):  # the shape tells, even if the gate were renamed
        remap_official_state_dict(
            {name.replace("fc_0", "DeltaT_DeltaD"): tensor for name, tensor in as_3x3_file(official).items()}
        )
    with pytest.raises(ValueError, match="not an official HcNet checkpoint"):
        remap_official_state_dict({"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})
