"""What makes the model fast, guarded without a clock: the folded form for inference, kernels and memory of a block.

Timings are hcnet bench's business (results/tables/speed.md). The literal form is the authors' formulation.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hcnet_cli.models import HcNet, hcnet
from hcnet_cli.models.hcnet import HcBlock, PackedLinear, conduct, refine
from hcnet_cli.models.literal import Block as LiteralBlock

VARIANTS = [(), ("conduction",), ("refinement",), ("gate",), ("anisotropy",), ("conservation",), ("gate", "refinement")]


def small(**kwargs: object) -> HcNet:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "depths": (1, 2, 1), "dims": (8, 12, 16), **kwargs}
    model = HcNet(**arguments).eval()
    for parameter in model.parameters():  # of order one, so that every branch is felt
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hcnet, "HIDDEN_VALUES", 2 * 4 * 8 * 16 * 16)  # two images of the first stage


# ---------------------------------------------------------------------------------------- the form for inference


@pytest.mark.parametrize("disable", VARIANTS, ids="+".join)
@pytest.mark.parametrize("size", [(64, 64), (50, 33)])
def test_folded_form_gives_the_same_numbers(
    disable: tuple[str, ...], size: tuple[int, int], few_images_at_a_time: None
) -> None:
    """Under timm's reparameterize_model: every variant, a batch that does not divide, the model itself untouched."""
    model, x = small(disable=disable), torch.randn(5, 3, *size)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        expected = model(x)
        folded = reparameterize_model(model)
        result = folded(x)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        maps = zip(folded.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True)
        for ours, theirs in maps:
            assert ours.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_folded_form_computes_few_images_at_a_time(few_images_at_a_time: None) -> None:
    """The hidden maps of the first stage never exist for more images than fit the cache."""
    folded = reparameterize_model(small())
    seen: list[tuple[int, ...]] = []
    folded.stages[0].blocks[0].refinement.branch.fc1.register_forward_hook(lambda m, i, out: seen.append(out.shape))
    with torch.inference_mode():
        folded(torch.randn(5, 3, 64, 64))
    assert [shape[0] for shape in seen] == [2, 2, 1]


def test_folded_form_can_be_copied_saved_and_cast() -> None:
    folded, x = reparameterize_model(small()), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = folded(x)
        assert torch.equal(copy.deepcopy(folded)(x), expected)
        file = io.BytesIO()
        torch.save(folded, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        half = folded.bfloat16()(x.bfloat16())
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
        torch.testing.assert_close(folded.float()(x), expected, rtol=0, atol=0.1 * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = folded(x)
        torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_a_model_may_be_folded_twice() -> None:
    folded, x = reparameterize_model(small()), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(reparameterize_model(folded)(x), folded(x))


def test_weights_cannot_slip_into_a_folded_model() -> None:
    """They would be used in part only: w is folded into S, and the linear layers are reordered copies."""
    for disable in ((), ("conduction",)):
        model = small(disable=disable)
        with pytest.raises(RuntimeError, match="Missing key"):
            reparameterize_model(model).load_state_dict(model.state_dict())


@pytest.mark.parametrize("dynamic", [False, True])
def test_folded_form_compiles_as_one_graph(dynamic: bool, few_images_at_a_time: None) -> None:
    torch._dynamo.reset()
    folded = reparameterize_model(small())
    compiled = torch.compile(folded, fullgraph=True, dynamic=dynamic, backend="eager")
    with torch.inference_mode():
        for batch in (3, 5):
            x = torch.randn(batch, 3, 64, 48)
            torch.testing.assert_close(compiled(x), folded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dynamic", "turns"), [(False, 3), (True, 1)])
def test_compiled_graph_takes_turns_where_sizes_are_fixed(
    dynamic: bool, turns: int, few_images_at_a_time: None
) -> None:
    """Five images of the first stage in three turns, the rest at once; a graph for any size cannot count them."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        compiled = torch.compile(reparameterize_model(small()), fullgraph=True, dynamic=dynamic, backend=backend)
        compiled(torch.randn(5, 3, 64, 64))
    (graph,) = graphs
    gelus = [node for node in graph.graph.nodes if "gelu" in str(node.target)]
    assert len(gelus) == 1 + turns + 2 + 1  # of the stem, the first stage, the others


def test_linear_layers_are_packed_where_the_machine_can() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    packed = [m for m in reparameterize_model(small()).modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 2 * 4
    assert all(m.packed is not None and m.packed.is_mkldnn for m in packed)


# ---------------------------------------------------------------------------------------- kernels and memory


class Kernels(TorchDispatchMode):
    """Lists the operators that compute: views and allocations are free."""

    FREE = ("view", "permute", "transpose", "empty", "expand", "detach", "slice", "split", "unsqueeze", "alias", "t")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default").removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def blocks() -> tuple[HcBlock, LiteralBlock]:
    torch.manual_seed(0)
    return HcBlock(16), LiteralBlock(16, 5)


def feature_map() -> Tensor:
    return torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)


def test_kernels_of_a_block() -> None:
    """Eleven, folded for inference: every further pass over a feature map costs what a passage through memory costs."""
    ours, literal = blocks()

    def kernels(block: nn.Module) -> list[str]:
        u = feature_map()
        with torch.no_grad(), Kernels() as counted:
            block(u)
        return sorted(counted.names)

    folded = nn.Sequential(ours)
    reparameterize_model(folded, inplace=True)
    linear = "mkldnn._linear_pointwise" if torch.backends.mkldnn.is_available() else "addmm"
    step = ["convolution", "mean.dim", "mm", "sigmoid", "addcmul"]
    assert kernels(folded) == sorted([*step, "native_group_norm", linear, "gelu_", "convolution", linear, "add.Tensor"])
    assert len(kernels(folded)) < len(kernels(literal.eval()))


def saved_bytes(run: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes that the graph of `run` keeps for the backward pass, each storage once, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_kept_for_the_backward_pass(bf16: bool) -> None:
    """Less than two thirds of what the literal form keeps: the hidden map once, not three times."""

    def saved(block: nn.Module) -> int:
        x = feature_map().requires_grad_()
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return saved_bytes(lambda: block(x), parameters)

    ours, literal = blocks()
    assert saved(ours) < 0.65 * saved(literal)


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("size", [(7, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize("frozen", [False, True])
def test_lean_refinement_has_autograds_gradients(
    images: int, size: tuple[int, int], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many images are computed at a time, on maps smaller than the filters too."""
    monkeypatch.setattr(hcnet, "HIDDEN_VALUES", images * 12 * size[0] * size[1])
    torch.manual_seed(0)
    shapes = [(5, *size, 6), (12, 6), (12,), (12, 1, 3, 3), (6, 12), (6,)]
    x, *weights = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    x.requires_grad_(not frozen)
    w1, b1, filters, w2, b2 = weights
    hidden = nn.functional.gelu(nn.functional.linear(x, w1, b1)).permute(0, 3, 1, 2)
    filtered = nn.functional.conv2d(hidden, filters, padding=1, groups=12).permute(0, 2, 3, 1)
    plain = nn.functional.linear(filtered, w2, b2)
    ours = refine(x, *weights)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    inputs, cotangent = weights if frozen else [x, *weights], torch.randn_like(plain)
    pairs = zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (ours, plain)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_refinement_in_low_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a refinement, of its parameters in float32 under autocast, near those of autograd in float32."""
    monkeypatch.setattr(hcnet, "HIDDEN_VALUES", 64 * 12 * 12)  # one image
    block, x, cotangent = blocks()[0], feature_map(), feature_map()

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = block.refinement(x)
        assert out.dtype is dtype
        return list(torch.autograd.grad(out, list(block.refinement.parameters()), cotangent.to(dtype)))

    lean = gradients(dtype)
    monkeypatch.setattr(hcnet.RefinementApproximation, "_learns", lambda self, device: False)
    for ours, expected in zip(lean, gradients(torch.float32), strict=True):
        assert ours.dtype is torch.float32
        error = (ours - expected).norm() / expected.norm()
        assert error < (0.02 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("size", [(17, 19), (4, 3), (2, 2), (1, 1), (1, 9)])
@pytest.mark.parametrize("k", [3, 5, 7, 9])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_gradients_of_a_heat_step_are_autograds(k: int, size: tuple[int, int], bf16: bool, images: int) -> None:
    """Integers, so that sums in any order are exact: windows, and taps that reach beyond a small map, left out.

    The rate is of each image, or (without the gate) one for all.
    """
    torch.manual_seed(0)
    u = torch.randint(-2, 3, (2, 8, *size)).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    stencil = torch.randint(-2, 3, (8, 1, k, k)).float().requires_grad_()
    rate = torch.randint(1, 3, (images, 8, 1, 1)).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = conduct(u, stencil, rate)
        flow = nn.functional.conv2d(u, stencil, padding=k // 2, groups=8)
    plain = torch.addcmul(u, rate, flow)
    assert "Conduct" in str(ours.grad_fn)
    assert ours.dtype is flow.dtype
    assert torch.equal(ours, plain.to(ours.dtype))
    cotangent, inputs = torch.randint(-1, 2, ours.shape).float(), (u, stencil, rate)
    ours_and_plain = (torch.autograd.grad(out, inputs, cotangent.to(out.dtype)) for out in (ours, plain))
    for a, b in zip(*ours_and_plain, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=0.01 if bf16 else 0, atol=0)


def test_stencil_gradient_of_a_large_map_comes_in_windows() -> None:
    """5 x 5 in four calls of 3 x 3, which oneDNN has quick code for; none with the whole stencil."""
    u, stencil = torch.randn(1, 8, 16, 16, requires_grad=True), torch.randn(8, 1, 5, 5, requires_grad=True)
    out = conduct(u, stencil, torch.ones(1, 8, 1, 1))
    shapes: list[tuple[int, ...]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution_backward" in str(func) and args[-1][1]:
                shapes.append(tuple(args[2].shape[2:]))
            return func(*args, **(kwargs or {}))

    with Calls():
        out.sum().backward()
    assert shapes == [(3, 3)] * 4


@pytest.mark.parametrize("bf16", [False, True])
def test_backward_pass_stays_in_channels_last(bf16: bool) -> None:
    """No gradient of a map in another layout: adding two layouts takes four times as long (Tensor.mean makes one)."""

    class Maps(TorchDispatchMode):
        """Counts the maps that operators make, and those in a layout of their own."""

        maps = others = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == u.shape and 0 not in out.stride():
                self.maps += 1
                self.others += not out.is_contiguous(memory_format=torch.channels_last)
            return out

    u, block = feature_map().requires_grad_(), blocks()[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = block(u)
    cotangent = feature_map().to(out.dtype)
    with Maps() as seen:
        out.backward(cotangent)
    assert seen.maps >= 5
    assert seen.others == 0
