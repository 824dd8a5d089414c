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

from hcnet_cli.models import HcNet
from hcnet_cli.models.hcnet import HcBlock, PackedLinear, RefinementByImages, gelu_filters, stencil_conv
from hcnet_cli.models.reference import Block as LiteralBlock

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
    monkeypatch.setattr(RefinementByImages, "CACHE", 2 * 4 * 8 * 16 * 16 * 4)  # two images of the first stage


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
    assert kernels(folded) == sorted([*step, "native_group_norm", linear, "gelu", "convolution", linear, "add.Tensor"])
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
    """A quarter less than the literal form keeps: the hidden map twice, not three times (gelu is computed again)."""

    def saved(block: nn.Module) -> int:
        x = feature_map().requires_grad_()
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return saved_bytes(lambda: block(x), parameters)

    ours, literal = blocks()
    assert saved(ours) < 0.8 * saved(literal)


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_recomputed_gelu_gives_autograds_gradients(frozen: str | None) -> None:
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64).requires_grad_(frozen != "x")
    weight = torch.randn(6, 1, 3, 3, dtype=torch.float64).requires_grad_(frozen != "weight")
    inputs = [t for t in (x, weight) if t.requires_grad]
    cotangent = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    plain = nn.functional.conv2d(nn.functional.gelu(x), weight, padding=1, groups=6)
    ours = gelu_filters(x, weight)
    assert torch.equal(ours, plain)
    pairs = zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(plain, inputs, cotangent), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("k", [5, 7, 9])
@pytest.mark.parametrize("bf16", [False, True])
def test_weight_gradient_in_windows_is_autograds(k: int, bf16: bool) -> None:
    """Integers, so that sums in any order are exact; a map large enough to be computed in windows, odd sides."""
    torch.manual_seed(0)
    u = torch.randint(-2, 3, (1, 8, 181, 183)).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    stencil = torch.randint(-2, 3, (8, 1, k, k)).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = stencil_conv(u, stencil)
        plain = nn.functional.conv2d(u, stencil, padding=k // 2, groups=8)
    assert "StencilConv" in str(ours.grad_fn)
    assert ours.dtype is plain.dtype
    assert torch.equal(ours, plain)
    cotangent = torch.randint(-1, 2, ours.shape).to(ours.dtype)
    for a, b in zip(*(torch.autograd.grad(out, (u, stencil), cotangent) for out in (ours, plain)), strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=0.01 if bf16 else 0, atol=0)
