"""timm's contract for a backbone, restated from its `tests/test_models.py` (1.0.31) and applied to `hcnet_pico`.

Every test there that says something about a convolutional model without downloaded weights has its counterpart here,
with its name in the docstring. The four larger sizes differ from pico in numbers alone; what does not run the
network is asked of all five.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import hcnet_cli.models  # noqa: F401  (registers the sizes)

NAMES = ["hcnet_pico", "hcnet_tiny", "hcnet_tiny_release", "hcnet_small", "hcnet_base"]
TRACER = {
    "leaf_modules": list(get_notrace_modules()),
    "autowrap_functions": list(get_notrace_functions()),
    "param_shapes_constant": True,
}


def pico(**kwargs: object) -> nn.Module:
    return timm.create_model("hcnet_pico", **kwargs)


def check_features(outputs: list[Tensor], info: FeatureInfo, size: tuple[int, int], batch_size: int = 1) -> None:
    assert len(info.channels()) == len(outputs) >= 3
    for channels, reduction, out in zip(info.channels(), info.reduction(), outputs, strict=True):
        assert out.shape[:2] == (batch_size, channels)
        assert tuple(out.shape[2:]) == tuple(math.ceil(side / reduction) for side in size)
        assert not out.isnan().any()


# ------------------------------------------------------------------------------------------ registry and configuration


def test_all_sizes_are_registered() -> None:
    assert timm.list_models("hcnet*") == sorted(NAMES)
    assert all(timm.is_model(name) for name in NAMES)
    assert timm.list_pretrained("hcnet*") == []  # no weights are published: nothing claims to have any


@pytest.mark.parametrize("name", NAMES)
def test_configuration_of_each_size(name: str) -> None:
    """The parts of test_model_default_cfgs that look at names and attributes."""
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.default_cfg
    assert model.pretrained_cfg is cfg or model.pretrained_cfg == cfg
    assert cfg["architecture"] == name
    assert cfg["num_classes"] == model.num_classes == 1000
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["first_conv"] + ".weight" in model.state_dict()
    assert cfg["classifier"] + ".weight" in model.state_dict()
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert all(isinstance(model.get_submodule(info["module"]), nn.Module) for info in model.feature_info)
    data = timm.data.resolve_data_config(model=model)
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")
    assert data["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


def test_pretrained_weights_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        pico(pretrained=True)


def test_device_and_type_are_arguments() -> None:
    """test_model_default_cfgs: given at creation, kept by a new head, and without effect on the weights drawn."""
    torch.manual_seed(0)
    expected = pico().state_dict()
    torch.manual_seed(0)
    model = pico(device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in model.state_dict().items())
    model.to("meta").reset_classifier(0)
    model.reset_classifier(3)
    assert model.head.fc.weight.device.type == "meta"
    assert model.head.fc.weight.dtype is torch.bfloat16
    assert pico(device="meta").norm.weight.device.type == "meta"


# ------------------------------------------------------------------------------------------ forward, backward


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (33, 47)])
def test_forward(size: tuple[int, int]) -> None:
    """test_model_forward: finite, and equal under gradient checkpointing."""
    model = pico().eval()
    x = torch.randn(1, 3, *size)
    out = model(x)
    assert out.shape == (1, 1000)
    assert not out.isnan().any()
    model.set_grad_checkpointing()
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"drop_rate": 0.1, "drop_path_rate": 0.1}])
def test_backward(arguments: dict) -> None:
    """test_model_backward: every parameter gets a gradient."""
    model = pico(num_classes=42, **arguments).train()
    out = model(torch.randn(2, 3, 128, 128))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert not out.isnan().any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_input_channels(in_chans: int) -> None:
    model = pico(in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 1000)


@pytest.mark.parametrize("arguments", [{"act_layer": "relu"}, {"norm_layer": "layernorm2d"}, {"act_layer": nn.SiLU}])
def test_layers_by_name_or_class(arguments: dict) -> None:
    assert pico(**arguments).eval()(torch.randn(1, 3, 32, 32)).isfinite().all()


# ------------------------------------------------------------------------------------------ head


def test_head() -> None:
    """test_model_default_cfgs: unpooled features, pre-logits, and the classifier and pooling taken away."""
    model = pico().eval()
    x = torch.randn(1, 3, 224, 224)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *model.default_cfg["pool_size"])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model(x), model.get_classifier()(pre_logits))

    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7
    assert model(x).shape == (1, 7)
    assert (model.get_classifier().weight.std() < 0.03).all()  # initialised as the first head was
    assert pico(num_classes=0, global_pool="").eval()(x).shape == features.shape
    assert pico(num_classes=0).eval()(x).shape == pre_logits.shape


# ------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "hook"])
@pytest.mark.parametrize("size", [(96, 96), (65, 34)])
def test_features_list(feature_cls: str | None, size: tuple[int, int]) -> None:
    """test_model_forward_features, test_model_forward_intermediates_features."""
    model = pico(features_only=True, **({"feature_cls": feature_cls} if feature_cls else {})).eval()
    check_features(list(model(torch.randn(1, 3, *size))), model.feature_info, size)
    assert model.feature_info.channels() == [32, 64, 128, 160]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_features_dict() -> None:
    model = pico(features_only=True, feature_cls="dict").eval()
    features = model(torch.randn(1, 3, 64, 64))
    assert len(features) == 4
    check_features(list(features.values()), model.feature_info, (64, 64))


@pytest.mark.parametrize("out_indices", [(1, 3), (0,), (-2, -1), (2,)])
def test_features_of_chosen_stages(out_indices: tuple[int, ...]) -> None:
    """The maps are those of the whole model, and what lies behind the last one is not kept."""
    torch.manual_seed(0)
    whole = pico().eval()
    model = pico(features_only=True, out_indices=out_indices).eval()
    model.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.model.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    _, maps = whole.forward_intermediates(x)
    for out, index in zip(model(x), out_indices, strict=True):
        torch.testing.assert_close(out, maps[index])
    assert len(model.model.stages) == max(i % 4 for i in out_indices) + 1


def test_features_train_with_drop_path() -> None:
    """The default extractor keeps drop path: a detector built on `features_only` is regularised as it asks to be."""
    model = pico(features_only=True, drop_path_rate=0.9).train()
    x = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    last = model(x)[-1]
    assert (last - last[:1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------ intermediates


def test_intermediates() -> None:
    """test_model_forward_intermediates."""
    model = pico().eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = torch.randn(1, 3, 96, 96)
    out, maps = model.forward_intermediates(x, output_fmt="NCHW")
    check_features(maps, info, (96, 96))
    torch.testing.assert_close(out, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(out, model.forward_intermediates(x)[0], rtol=1e-4, atol=1e-5)


def test_intermediates_arguments() -> None:
    model = pico().eval()
    x = torch.randn(2, 3, 64, 48)
    out, maps = model.forward_intermediates(x)
    for indices, expected in ((2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])):
        got = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert isinstance(got, list)
        assert all(torch.equal(a, maps[i]) for a, i in zip(got, expected, strict=True))

    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed, [*maps[:3], out], strict=True))  # the last stage alone

    sequences = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for sequence, feature_map in zip(sequences, maps, strict=True):
        batch, channels, height, width = feature_map.shape
        assert sequence.shape == (batch, height * width, channels)
        assert torch.equal(sequence[1, 3], feature_map[1, :, 3 // width, 3 % width])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHCW")
    with pytest.raises(AssertionError):
        model.forward_intermediates(x, indices=[4])


def test_intermediates_stop_early() -> None:
    model = pico().eval()
    x = torch.randn(1, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    ran = []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    out, got = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert ran == [0, 1]
    assert torch.equal(got[0], maps[1])
    assert torch.equal(out, maps[1])  # not normed: the last stage was not reached


def test_prune_intermediate_layers() -> None:
    model = pico(drop_path_rate=0.1).train()
    assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(model.stages) == 3
    assert model.num_blocks == 8
    assert isinstance(model.norm, nn.Identity)
    assert model.num_classes == 0
    noise = torch.rand(model.num_blocks, 2)
    maps = model.forward_intermediates(torch.randn(2, 3, 32, 32), indices=[0, 2], intermediates_only=True, noise=noise)
    assert [feature_map.shape[1] for feature_map in maps] == [32, 128]


def test_group_matcher() -> None:
    """Every parameter belongs to a group, in the order of the network."""
    from timm.models import group_parameters

    model = pico()
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        names = [name for members in groups.values() for name in members]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    order = list(group_parameters(model, model.group_matcher()).values())
    assert all(name.startswith("stem") for name in order[0])
    assert any("stages.1.downsample" in name for name in order[3])
    assert any("stages.1.blocks.0" in name for name in order[3])


# ------------------------------------------------------------------------------------------ tracing, scripting, export


def traced(model: nn.Module) -> nn.Module:
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=TRACER, suppress_diff_warning=True)
    return create_feature_extractor(
        model,
        train_return_nodes=train_nodes[-1:],
        eval_return_nodes=eval_nodes[-1:],
        tracer_kwargs=TRACER,
        suppress_diff_warning=True,
    )


def test_fx_forward() -> None:
    """test_model_forward_fx: the traced graph gives the same numbers, bit for bit."""
    model = pico(drop_path_rate=0.1).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        (out,) = traced(model)(x).values()
        assert torch.equal(out, model(x))


def test_fx_backward() -> None:
    """test_model_backward_fx, with drop path on."""
    model = traced(pico(num_classes=42, drop_path_rate=0.1).train())
    (out,) = model(torch.randn(2, 3, 64, 64)).values()
    out.mean().backward()
    assert out.shape == (2, 42)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("through_fx", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript(through_fx: bool) -> None:
    """test_model_forward_torchscript, test_model_forward_fx_torchscript."""
    with set_scriptable(True):
        model = pico().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        out = torch.jit.script(traced(model) if through_fx else model)(x)
        torch.testing.assert_close(next(iter(out.values())) if through_fx else out, model(x))


def test_export() -> None:
    """torch.export with a free batch and image size (above 32: a map of one pixel is a special case)."""
    model = pico().eval()
    batch = torch.export.Dim("batch", max=4096)
    height, width = (torch.export.Dim(name, min=33, max=4096) for name in ("height", "width"))
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    x = torch.randn(3, 3, 80, 48)
    torch.testing.assert_close(exported(x), model(x))
