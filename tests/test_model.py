"""The model: sizes, components that can be disabled, drop path from given draws, recomputation, layout, compilation."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hcnet_cli.models import HcNet
from hcnet_cli.models.hcnet import HcBlock
from hcnet_cli.profile import count_macs, count_params
from hcnet_cli.sizes import COMPONENTS

SIZES = {  # params (1000 classes), MACs at 224 x 224
    "hcnet_pico": (1_656_104, 309_123_392),
    "hcnet_tiny": (28_616_936, 4_216_637_440),
    "hcnet_tiny_release": (27_988_200, 4_762_177_536),
    "hcnet_small": (49_839_336, 8_162_145_792),
    "hcnet_base": (87_219_752, 14_651_750_848),
}


def pico(**kwargs: object) -> HcNet:
    torch.manual_seed(0)
    return timm.create_model("hcnet_pico", **{"num_classes": 10, **kwargs})


def small(**kwargs: object) -> HcNet:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "depths": (1, 2, 2, 1), "dims": (8, 12, 16, 20), **kwargs}
    model = HcNet(**arguments)
    for parameter in model.parameters():  # of order one, so that every branch is felt
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ---------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (count_params(model), count_macs(model, torch.empty(1, 3, 224, 224))) == SIZES[name]


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 17), (127, 8), (1, 1)])
def test_any_input_size(size: tuple[int, int]) -> None:
    logits, maps = pico().eval().forward_intermediates(torch.randn(2, 3, *size))
    expected = [-(-side // 4) for side in size]
    for feature_map in maps:
        assert list(feature_map.shape[2:]) == expected
        expected = [-(-side // 2) for side in expected]
    assert logits.isfinite().all()


def test_initial_weights() -> None:
    """Blocks and head: std 0.02 and zero biases; stem and downsampling: PyTorch's default, as in the released code."""
    model = timm.create_model("hcnet_pico")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()
        elif name.startswith("stem") or "downsample" in name:
            fan_in = (3 if "conv1" in name else model.get_parameter(name.replace("bias", "weight")).shape[1]) * 9
            assert 0.5 < parameter.std() * (3 * fan_in) ** 0.5 < 1.5, name
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert 0.8 < parameter.std() / 0.02 < 1.2, name
    assert (timm.create_model("hcnet_pico", disable="gate").stages[0].blocks[0].conduction.rate == 0).all()


@pytest.mark.parametrize(
    "arguments",
    [{"kernel_size": 4}, {"kernel_size": 1}, {"depths": (1, 1)}, {"drop_path_rate": 1.0}, {"depths": (), "dims": ()}],
)
def test_arguments_without_meaning_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        pico(**arguments)


# ---------------------------------------------------------------------------------------- disable


def written_out(block: HcBlock, u: Tensor, disable: tuple[str, ...]) -> Tensor:
    """A block from the table of components, parameter by parameter, in plain operations."""
    p = dict(block.named_parameters())
    dim = u.shape[1]
    if "conduction" not in disable:
        if "anisotropy" in disable:
            w = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=u.dtype).repeat(dim, 1, 1, 1) / 4
        else:
            w = p["conduction.weight"]
        flow = F.conv2d(u, w, padding=w.shape[-1] // 2, groups=dim)
        if "conservation" not in disable:
            flow = flow - u * w.sum(dim=(1, 2, 3)).reshape(1, dim, 1, 1)
        if "gate" in disable:
            rate = 1 / (1 + torch.exp(-p["conduction.rate"])).reshape(1, dim, 1, 1)
        else:
            mean = u.sum(dim=(2, 3)) / (u.shape[2] * u.shape[3])
            rate = 1 / (1 + torch.exp(-torch.einsum("oc,bc->bo", p["conduction.gate.weight"], mean)))[:, :, None, None]
        u = u + rate * flow
    x = u - u.mean(dim=(1, 2, 3), keepdim=True)
    x = x / (x.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt()
    x = x * p["refinement.norm.weight"].reshape(1, -1, 1, 1) + p["refinement.norm.bias"].reshape(1, -1, 1, 1)
    x = torch.einsum("oc,bchw->bohw", p["refinement.fc1.weight"], x) + p["refinement.fc1.bias"].reshape(1, -1, 1, 1)
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if "refinement" not in disable:
        x = F.conv2d(x, p["refinement.filters.weight"], padding=1, groups=x.shape[1])
    x = torch.einsum("oc,bchw->bohw", p["refinement.fc2.weight"], x) + p["refinement.fc2.bias"].reshape(1, -1, 1, 1)
    return u + x


# parameters and MACs of pico at 64 x 64 with 10 classes, for every combination that has a meaning
VARIANTS: dict[tuple[str, ...], tuple[int, int]] = {
    (): (1_496_714, 25_339_712),
    ("conduction",): (1_344_138, 24_361_536),
    ("refinement",): (1_459_850, 24_113_984),
    ("gate",): (1_370_762, 25_212_736),
    ("anisotropy",): (1_471_114, 24_794_944),
    ("conservation",): (1_496_714, 25_339_712),
    ("conduction", "refinement"): (1_307_274, 23_135_808),
    ("refinement", "gate"): (1_333_898, 23_987_008),
    ("refinement", "anisotropy"): (1_434_250, 23_569_216),
    ("refinement", "conservation"): (1_459_850, 24_113_984),
    ("gate", "anisotropy"): (1_345_162, 24_667_968),
    ("gate", "conservation"): (1_370_762, 25_212_736),
    ("refinement", "gate", "anisotropy"): (1_308_298, 23_442_240),
    ("refinement", "gate", "conservation"): (1_333_898, 23_987_008),
}


@pytest.mark.parametrize("disable", VARIANTS)
def test_disabled_components_leave_their_definition(disable: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    block = HcBlock(6, disable=disable).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    u = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(u), written_out(block, u, disable), rtol=0, atol=1e-10)


@pytest.mark.parametrize("disable", VARIANTS)
def test_disabled_components_cost_nothing(disable: tuple[str, ...]) -> None:
    model = pico(disable=disable)
    assert (count_params(model), count_macs(model, torch.empty(1, 3, 64, 64))) == VARIANTS[disable]
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # none unused: DDP would hang


@pytest.mark.parametrize("disable", [c for n in range(6) for c in itertools.combinations(COMPONENTS, n)])
def test_combinations_without_meaning_are_refused(disable: tuple[str, ...]) -> None:
    if disable in VARIANTS:
        assert pico(disable=disable[::-1]).disable == disable
    else:
        with pytest.raises(ValueError, match=r"without (conduction|anisotropy)"):
            pico(disable=disable)


def test_unknown_component_is_refused() -> None:
    with pytest.raises(ValueError, match='unknown component "refinment"'):
        pico(disable=("refinment",))


# ---------------------------------------------------------------------------------------- drop path


def test_noise_decides_drop_path() -> None:
    """Block i leaves out sample b's refinement where noise[i, b] < rate_i, else scales it by 1 / (1 - rate_i)."""
    model = small(drop_path_rate=0.5).double().train()
    rates = torch.linspace(0, 0.5, model.num_blocks).tolist()
    noise = torch.rand(model.num_blocks, 3, dtype=torch.float64)
    noise[1] = torch.tensor([rates[1] - 1e-4, rates[1] + 1e-4, 0.0])
    x = torch.randn(3, 3, 20, 24, dtype=torch.float64)

    u, row = model.stem(x), 0
    for stage in model.stages:
        u = stage.downsample(u)
        for block in stage.blocks:
            u = block.conduction(u)  # never dropped
            keep = [0.0 if draw < rates[row] else 1 / (1 - rates[row]) for draw in noise[row].tolist()]
            u = u + torch.tensor(keep, dtype=torch.float64).reshape(3, 1, 1, 1) * block.refinement(u)
            row += 1
    expected = model.head(model.norm(u))
    torch.testing.assert_close(model(x, noise), expected, rtol=0, atol=1e-6)  # rates are float32


def test_micro_batches_with_their_noise_equal_the_batch() -> None:
    model = small(drop_path_rate=0.4).double().train()
    x, noise = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.rand(model.num_blocks, 6)
    whole = model(x, noise)
    parts = torch.cat([model(x[i : i + 3], noise[:, i : i + 3]) for i in (0, 3)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    assert not torch.allclose(whole, model(x, noise.flip(1)))  # the draws matter


def test_training_with_given_noise_leaves_torchs_generator_alone() -> None:
    model = small(drop_path_rate=0.4).train()
    state = torch.get_rng_state()
    model(
        torch.randn(2, 3, 16, 16, generator=torch.Generator()),
        torch.rand(model.num_blocks, 2, generator=torch.Generator()),
    )
    assert torch.equal(state, torch.get_rng_state())


def test_without_noise_the_model_draws_at_the_right_rate() -> None:
    """As an ordinary timm model: a block's branch is missing for its rate of the samples, right on average."""
    model = HcNet(depths=(1, 1), dims=(4, 4), drop_path_rate=0.3, num_classes=0, global_pool="").train()
    stage = model.stages[1]
    torch.nn.init.zeros_(stage.blocks[0].refinement.fc2.weight)
    torch.nn.init.ones_(stage.blocks[0].refinement.fc2.bias)  # the branch adds exactly 1
    x = torch.zeros(4000, 4, 1, 1)
    base = stage.blocks[0].conduction(stage.downsample(x))
    added = (stage(x) - base)[:, 0, 0, 0].detach()
    assert added.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert 0.26 < (added < 0.5).float().mean() < 0.34  # 5 standard deviations
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_evaluation_ignores_noise() -> None:
    model = small(drop_path_rate=0.4).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), model(x, torch.zeros(model.num_blocks, 2)))


def test_noise_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="6 blocks"):
        small(drop_path_rate=0.4).train()(torch.randn(2, 3, 16, 16), torch.rand(5, 2))


@pytest.mark.parametrize("given", [True, False])
def test_gradient_checkpointing_changes_nothing(given: bool) -> None:
    """Recomputation sees the same draws: equal losses and gradients, bit for bit."""
    model = small(drop_path_rate=0.5).train()
    x = torch.randn(4, 3, 16, 16)
    noise = torch.rand(model.num_blocks, 4) if given else None
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(x, noise)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    def saved(enable: bool) -> int:
        model = small(depths=(3, 4, 2, 1)).train()
        model.set_grad_checkpointing(enable)
        parameters = {p.data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in parameters:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(2, 3, 64, 64))
        return sum(sizes.values())

    assert saved(True) < saved(False) / 2


# ---------------------------------------------------------------------------------------- layout, types, compiler


class Layouts(TorchDispatchMode):
    """Lists copies of whole feature maps, and convolutions and norms whose output is not channels_last."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.copies: list[str] = []
        self.contiguous: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[0] == self.batch and min(out.shape) > 1:
            name = f"{func} {list(out.shape)}"
            if any(word in name for word in ("clone", "copy")):
                self.copies.append(name)
            computes_a_map = any(word in name for word in ("convolution", "group_norm", "addcmul"))
            if computes_a_map and not out.is_contiguous(memory_format=torch.channels_last):
                self.contiguous.append(name)
        return result


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_every_feature_map_stays_channels_last(in_chans: int, training: bool) -> None:
    """From a contiguous image: one conversion of layout at the entrance and none after it, drop path or not."""
    model = small(in_chans=in_chans, drop_path_rate=0.5).train(training)
    x = torch.randn(2, in_chans, 64, 64)
    with torch.no_grad(), Layouts(batch=2) as layouts:
        model(x)
    entrance = [] if in_chans == 3 else ["aten.convolution.default [2, 4, 32, 32]"]
    assert layouts.contiguous == entrance
    assert len(layouts.copies) == 1, layouts.copies


@pytest.mark.parametrize("training", [False, True])
def test_layout_of_the_input_does_not_matter(training: bool) -> None:
    model = small(drop_path_rate=0.4).train(training)
    x, noise = torch.randn(2, 3, 40, 24), torch.rand(model.num_blocks, 2)
    expected = model(x, noise)
    as_channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(expected, model(as_channels_last, noise))
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(expected, model(as_channels_last, noise))


def test_half_precision() -> None:
    """Under bf16 autocast, forward and backward, and as a model in bf16: close to float32, nothing infinite."""
    model = pico(drop_path_rate=0.2).train()
    x, noise = torch.randn(2, 3, 32, 32), torch.rand(model.num_blocks, 2)
    exact = model(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype is torch.float32 for p in model.parameters())
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    half = model.to(torch.bfloat16)(x.bfloat16(), noise)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(training: bool) -> None:
    """No graph break, drop path and recomputation included; the compiler's graph gives our numbers and gradients."""
    torch._dynamo.reset()
    model = small(depths=(1, 1), dims=(8, 12), drop_path_rate=0.3).train(training)
    model.set_grad_checkpointing(training)
    x, noise = torch.randn(2, 3, 32, 32), torch.rand(model.num_blocks, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise), model(x, noise))
    if training:
        parameters = list(model.parameters())
        for ours, theirs in zip(
            *(torch.autograd.grad(f(x, noise).sum(), parameters) for f in (compiled, model)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_compiles_pico_as_one_graph_for_any_size() -> None:
    """The five sizes differ in numbers alone, so pico stands for them: one graph, whatever the image's size."""
    torch._dynamo.reset()
    model = pico().eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> nn.Module:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in ((64, 48), (80, 72), (97, 120)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_parameter_groups_cover_every_parameter() -> None:
    """Layer decay knows every parameter, and weight decay spares the 1-D ones alone."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    for disable in ((), ("gate",)):
        model = pico(disable=disable)
        assert model.no_weight_decay() == set()
        spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        assert all(p.ndim <= 1 for p in spared["params"])
        assert all(p.ndim > 1 for p in decayed["params"])
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        # stem, then downsampling with the first block behind it, then block after block, then norm and head
        assert len({g["lr_scale"] for g in groups}) >= model.num_blocks + 2
