"""UPerNet: equal to an independent one, sizes and costs of the tables, heads from mmsegmentation, synced
batch norm.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hcnet_cli.models  # noqa: F401  (registers HcNet with timm)
from hcnet_cli.profile import count_params
from hcnet_cli.tasks.segmentation.task import count_macs
from hcnet_cli.tasks.segmentation.upernet import BatchNorm, FCNHead, UPerHead, UPerNet, remap_mmseg_state_dict

IN_CHANS = (8, 12, 16, 20)


def tiny_backbone(**kwargs):
    return timm.create_model("hcnet_pico", dims=IN_CHANS, depths=(1, 1, 2, 1), **kwargs)


def tiny_model(num_classes=5, **kwargs):
    torch.manual_seed(0)
    return UPerNet(tiny_backbone(), num_classes, channels=16, aux_channels=8, **kwargs)


def features(height=50, width=70, batch=2):
    torch.manual_seed(1)
    return [
        torch.randn(batch, chans, -(-height // stride), -(-width // stride))
        for chans, stride in zip(IN_CHANS, (4, 8, 16, 32), strict=True)
    ]


def randomise_norms(module):
    """Statistics and weights that are not 0 and 1, so that a norm left out or swapped would be seen."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize("training", [False, True])
def test_heads_equal_those_of_transformers(training):
    """Same weights, same features: the logits of both heads equal an independent implementation's."""
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = upernet.UperNetConfig(
        backbone_config={"model_type": "resnet"},
        hidden_size=24,
        auxiliary_channels=10,
        auxiliary_num_convs=1,
        num_labels=7,
    )
    ours = [UPerHead(IN_CHANS, 7, channels=24, dropout=0), FCNHead(IN_CHANS[2], 7, channels=10, dropout=0)]
    theirs = [upernet.UperNetHead(config, IN_CHANS), upernet.UperNetFCNHead(config, IN_CHANS)]
    inputs = features()
    for mine, other, taken in zip(ours, theirs, (inputs, inputs[2]), strict=True):
        randomise_norms(mine)
        state = {
            name.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier."): tensor
            for name, tensor in mine.state_dict().items()
        }
        other.load_state_dict(state)
        got, expected = mine.train(training)(taken), other.train(training)(inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "gmacs", "params"), [("hcnet_tiny_release", 941.9, 57.96), ("hcnet_tiny", 930.5, 58.59)]
)
def test_macs_and_parameters_of_the_tables(name, gmacs, params):
    """150 classes, 512 x 2048: the auxiliary head counts in parameters, not in MACs."""
    model = UPerNet(timm.create_model(name), 150)
    assert count_macs(SimpleNamespace(model=model)) / 1e9 == pytest.approx(gmacs, abs=0.05)
    assert count_params(model) / 1e6 == pytest.approx(params, abs=0.005)


ANY_SIZE = tiny_model().eval()


@settings(max_examples=15, deadline=None)
@given(height=st.integers(8, 80), width=st.integers(8, 80))
def test_any_height_and_width(height, width):
    """Logits at stride 4, rounded as the backbone rounds; nothing depends on the input size."""
    model = ANY_SIZE
    with torch.no_grad():
        x = torch.rand(1, 3, height, width)
        first = model.backbone.forward_intermediates(x, intermediates_only=True)[0]
        assert model(x).shape == (1, 5, *first.shape[2:])


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "poolformer_s12"])
def test_other_backbones_and_no_parameter_without_gradient(name):
    """Any timm model with four stages; an unused parameter would stop DistributedDataParallel."""
    model = UPerNet(timm.create_model(name), 4, channels=16, aux_channels=8)
    logits, aux = model(torch.rand(2, 3, 64, 96))
    assert logits.shape == (2, 4, 16, 24)
    assert aux.shape == (2, 4, 4, 6)
    (logits.sum() + aux.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_no_unused_parameter_in_hcnet():
    model = tiny_model()
    sum(out.sum() for out in model(torch.rand(2, 3, 40, 40))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_backbone_without_four_stages_is_refused_in_words():
    with pytest.raises(ValueError, match="Linear cannot carry this head"):
        UPerNet(nn.Linear(2, 2), 3)


def test_training_on_one_image_is_refused_in_words():
    with pytest.raises(ValueError, match="two or more images"):
        tiny_model()(torch.rand(1, 3, 32, 32))


def test_initialisation_is_the_references():
    """Kaiming normal (fan out) for convolutions, N(0, 0.01) and zero bias for classifiers, one norm per
    output.
    """
    head = UPerHead((64, 64, 64, 64), 150, channels=128)
    weight = head.fpn_bottleneck.conv.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.conv_seg.bias.any()
    narrow = tiny_model(150, init_std=0.6)  # a recipe's number: narrow heads stand still with the reference's
    for classifier in (narrow.decode_head.conv_seg, narrow.auxiliary_head.conv_seg):
        assert classifier.weight.std().item() == pytest.approx(0.6, rel=0.1)
    assert [tuple(norm.weight.shape) for norm in tiny_model().norms] == [(chans,) for chans in IN_CHANS]
    assert all(
        conv.bias is None for conv in head.modules() if isinstance(conv, nn.Conv2d) and conv is not head.conv_seg
    )


def test_norm_names_decide_weight_decay_as_in_the_reference():
    """Decay is switched off by the word `norm` in a name: for the output norms, not for the heads' batch
    norms.
    """
    names = [name for name, _ in tiny_model().named_parameters() if not name.startswith("backbone.")]
    assert {name for name in names if "norm" in name} == {
        f"norms.{i}.{x}" for i in range(4) for x in ("weight", "bias")
    }


def test_dropout_follows_the_noise_and_nothing_else():
    """Channel c of image b is dropped where its number is below the rate; the torch generator is not
    asked.
    """
    head = FCNHead(4, 3, channels=6, dropout=0.5).train()
    head.convs = nn.Identity()
    x = torch.rand(2, 6, 5, 5)
    noise = torch.rand(6, 2)
    state = torch.get_rng_state()
    got = head(x, noise)
    assert torch.equal(torch.get_rng_state(), state)
    kept = torch.where(noise.T[:, :, None, None] >= 0.5, 2 * x, torch.zeros(()))
    torch.testing.assert_close(got, head.conv_seg(kept))
    torch.testing.assert_close(head.eval()(x, noise), head.conv_seg(x))


def test_noise_makes_a_training_step_repeatable():
    """Drop path and dropout both come from the noise: equal noise, equal logits; other noise, other
    logits.
    """
    torch.manual_seed(0)
    model = UPerNet(tiny_backbone(drop_path_rate=0.5), 5, channels=16, aux_channels=8).train()
    x = torch.rand(4, 3, 32, 32)
    drop_path, dropout = torch.rand(5, 4), torch.rand(model.num_dropout, 4)
    one, two = model(x, drop_path, dropout), model(x, drop_path, dropout)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], model(x, 1 - drop_path, dropout)[0])
    assert not torch.equal(one[0], model(x, drop_path, 1 - dropout)[0])
    assert not torch.equal(one[1], model(x, drop_path, 1 - dropout)[1])


def test_heads_of_an_mmsegmentation_checkpoint_load():
    """Names written out by hand from its UPerHead and FCNHead; wrapper prefix and backbone are dealt with."""
    model = tiny_model()
    convs = {
        "decode_head": [f"psp_modules.{i}.1" for i in range(4)]
        + ["bottleneck", "fpn_bottleneck"]
        + [f"{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)],
        "auxiliary_head": ["convs.0"],
    }
    numbers = ("conv.weight", *(f"bn.{x}" for x in ("weight", "bias", "running_mean", "running_var")))
    names = {f"{head}.{conv}.{x}" for head, parts in convs.items() for conv in parts for x in numbers}
    names |= {f"{head}.conv_seg.{x}" for head in convs for x in ("weight", "bias")}
    mine = {name for name in model.state_dict() if name.startswith(("decode_head", "auxiliary_head"))}
    assert {name for name in mine if not name.endswith("num_batches_tracked")} == names
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    checkpoint = {f"module.{name}": torch.full(shapes[name], 0.25) for name in names}
    checkpoint["module.backbone.patch_embed.proj.weight"] = torch.zeros(1)
    heads = remap_mmseg_state_dict({"meta": {"epoch": 1}, "state_dict": checkpoint})
    assert set(heads) == names
    result = model.load_state_dict(heads, strict=False)
    assert not result.unexpected_keys
    assert all(not name.startswith("decode_head") or name.endswith("tracked") for name in result.missing_keys)
    assert (model.decode_head.fpn_convs[2].conv.weight == 0.25).all()
    with pytest.raises(ValueError, match="no UPerHead"):
        remap_mmseg_state_dict({"backbone.weight": torch.zeros(1)})


# --- two processes --------------------------------------------------------------------------------------------


def half_of_the_batch(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    norm, x, weights = torch.load(folder / "input.pt", weights_only=False)
    part = x[[slice(0, 1), slice(1, 4)][rank]].clone().requires_grad_()  # unequal shares
    y = norm(part)
    (y * weights[[slice(0, 1), slice(1, 4)][rank]]).sum().backward()
    own = [norm.weight.grad, norm.bias.grad]
    for grad in own:
        torch.distributed.all_reduce(grad)
    torch.save((y.detach(), part.grad, own, norm.running_mean, norm.running_var), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_batch_norm_of_two_processes_equals_one(tmp_path: Path):
    """Outputs, gradients and running statistics equal `nn.BatchNorm2d` on the whole batch, also for unequal
    shares.
    """
    torch.manual_seed(0)
    norm = BatchNorm(6).double()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    x, weights = 3 + 2 * torch.randn(4, 6, 5, 7).double(), torch.randn(4, 6, 5, 7).double()
    torch.save((norm, x, weights), tmp_path / "input.pt")
    mp.start_processes(half_of_the_batch, (tmp_path,), nprocs=2, start_method="forkserver")
    plain = nn.BatchNorm2d(6).double()
    plain.load_state_dict(copy.deepcopy(norm.state_dict()))
    x.requires_grad_()
    y = plain(x)
    (y * weights).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad)
    for _, _, (weight, bias), mean, var in parts:
        torch.testing.assert_close(weight, plain.weight.grad)
        torch.testing.assert_close(bias, plain.bias.grad)
        torch.testing.assert_close(mean, plain.running_mean)
        torch.testing.assert_close(var, plain.running_var)
