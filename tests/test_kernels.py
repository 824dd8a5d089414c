"""Faster forms of the layers: they change no number beyond rounding, and what a layer says is what is trained.

Timings are hcnet bench's business (results/tables/speed.md).
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from hcnet_cli import kernels, profile
from hcnet_cli.kernels import refinement
from hcnet_cli.models import HcNet, HeatConduction, RefinementApproximation
from hcnet_cli.models.hcnet import HcBlock
from hcnet_cli.models.literal import Block as LiteralBlock
from hcnet_cli.sizes import COMPONENTS, ordered_components


def meaningful() -> list[tuple[str, ...]]:
    found = []
    for names in (c for n in range(6) for c in itertools.combinations(COMPONENTS, n)):
        try:
            found.append(ordered_components(names))
        except ValueError:
            continue
    return found


def small(**kwargs: object) -> HcNet:
    torch.manual_seed(0)
    model = HcNet(**{"num_classes": 5, "depths": (1, 2, 1), "dims": (8, 12, 16), **kwargs})
    for parameter in model.parameters():  # of order one, so that every branch is felt
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two images in the first stage, and recomputation on small maps too."""
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    monkeypatch.setattr(refinement.LeanRefinement, "chunk_elements", 2 * 4 * 8 * 16 * 16)
    monkeypatch.setattr(refinement.LeanRefinement, "checkpoint_elements", 0)


def accelerated(model: HcNet, inference: bool = False) -> HcNet:
    fast = copy.deepcopy(model)
    done = kernels.accelerate(fast, inference=inference)
    assert done
    assert not any("left out" in line or "no kernels" in line for line in done), done
    return fast


def step(model: nn.Module, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of a training step."""
    model.zero_grad()
    out = model(x, noise) if noise is not None else model(x)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


# ---------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("disable", meaningful(), ids="+".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_training_is_the_plain_models(disable: tuple[str, ...], dtype: torch.dtype, tolerance: float) -> None:
    model = small(disable=disable, drop_path_rate=0.3).to(dtype).train()
    fast, noise = accelerated(model), torch.rand(model.num_blocks, 5)
    for size in ((64, 48), (33, 9)):  # the second one's maps are smaller than the kernels
        x = torch.randn(5, 3, *size, dtype=dtype)
        assert_near(step(fast, x, noise), step(model, x, noise), tolerance)


@pytest.mark.parametrize("disable", meaningful(), ids="+".join)
@pytest.mark.parametrize("size", [(64, 64), (50, 33)])
def test_inference_is_the_plain_models(disable: tuple[str, ...], size: tuple[int, int]) -> None:
    model, x = small(disable=disable).eval(), torch.randn(5, 3, *size)
    fast = accelerated(reparameterize_model(model), inference=True)
    with torch.inference_mode():
        expected = model(x)
        assert_near([fast(x)], [expected], 1e-5)
        assert_near([accelerated(model)(x)], [expected], 1e-5)
        for ours, theirs in zip(fast.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert ours.is_contiguous(memory_format=torch.channels_last)
            assert_near([ours], [theirs], 1e-5)


def test_gradients_through_an_accelerated_model_in_evaluation() -> None:
    model, x = small().eval(), torch.randn(3, 3, 32, 32)
    fast = accelerated(reparameterize_model(model), inference=True)
    assert_near(step(fast, x), step(reparameterize_model(model), x), 2e-5)


def test_autocast() -> None:
    model, x = small(drop_path_rate=0.3).train(), torch.randn(5, 3, 64, 48)
    noise = torch.rand(model.num_blocks, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(accelerated(model), x, noise), step(model, x, noise)
    assert_near(ours, theirs, 0.03)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert_near([accelerated(model.eval(), inference=True)(x)], [model(x)], 0.03)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_size(batch: int) -> None:
    model, x = small().eval(), torch.randn(batch, 3, 64, 64)
    fast = accelerated(model, inference=True)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_of_blocks_changes_nothing() -> None:
    fast, x = accelerated(small().train()), torch.randn(3, 3, 32, 32)
    expected = step(fast, x)
    fast.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(step(fast, x), expected, strict=True))


# ---------------------------------------------------------------------------------------- what is read is trained


@pytest.mark.parametrize("method", ["forward", "contract"])
def test_an_edited_layer_is_what_trains_and_evaluates(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refinement times 10, edited before or after `accelerate`: loss and evaluation move as the plain model's do."""
    model, x = small().train(), torch.randn(5, 3, 64, 48)
    before, plain_before = accelerated(model), step(model, x)
    original: Callable[..., Tensor] = getattr(RefinementApproximation, method)
    monkeypatch.setattr(RefinementApproximation, method, lambda self, u: 10 * original(self, u))
    plain = step(model, x)
    assert (plain[0] - plain_before[0]).abs().max() > 1e-2
    for fast in (before, accelerated(model)):
        assert_near(step(fast, x), plain, 2e-5)
        with torch.no_grad():
            assert_near([copy.deepcopy(fast).eval()(x)], [copy.deepcopy(model).eval()(x)], 2e-5)


def test_a_subclass_is_left_alone() -> None:
    class Mine(RefinementApproximation):
        def forward(self, u: Tensor) -> Tensor:
            return 10 * super().forward(u)

    model = small()
    block = model.stages[0].blocks[0]
    block.refinement.__class__ = Mine
    assert "lean refinement x 3" in kernels.accelerate(model)
    assert type(block.refinement) is Mine


@pytest.mark.parametrize("edit", ["mean over the batch", "random"])
def test_a_layer_that_chunks_or_recomputation_would_change_is_left_out(
    edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RefinementApproximation.contract

    def contract(self: RefinementApproximation, hidden: Tensor) -> Tensor:
        if edit == "random":
            return original(self, nn.functional.dropout(hidden, 0.5))
        return original(self, hidden - hidden.mean(dim=0))

    monkeypatch.setattr(RefinementApproximation, "contract", contract)
    model = small()
    state = torch.get_rng_state()
    assert any("lean refinement left out" in line for line in kernels.accelerate(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(type(block.refinement) is RefinementApproximation for stage in model.stages for block in stage.blocks)


def test_an_edited_flow_is_what_runs_on_small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HeatConduction.flow
    monkeypatch.setattr(HeatConduction, "flow", lambda self, u: 10 * original(self, u))
    model, x = small().train(), torch.randn(3, 3, 16, 16)
    fast = copy.deepcopy(model)
    assert any("heat conduction on small maps left out" in line for line in kernels.accelerate(fast))
    assert_near(step(fast, x), step(model, x), 2e-5)


def test_batch_norm_sees_the_whole_batch() -> None:
    model, x = small(norm_layer="batchnorm2d").train(), torch.randn(5, 3, 64, 48)
    fast = copy.deepcopy(model)
    assert any("lean refinement left out" in line for line in kernels.accelerate(fast))
    assert_near(step(fast, x), step(model, x), 2e-5)


def test_accelerate_moves_no_random_generator_and_no_weight() -> None:
    model = small()
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    kernels.accelerate(model, inference=True)
    assert torch.equal(state, torch.get_rng_state())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))


def test_forward_hooks_fire_in_training_and_not_in_the_comparison() -> None:
    model, images = small().train(), []
    model.stages[0].blocks[0].refinement.fc1.register_forward_hook(lambda m, i, out: images.append(len(out)))
    kernels.accelerate(model)
    assert images == []
    step(model, torch.randn(5, 3, 64, 64))
    with torch.no_grad():
        model(torch.randn(5, 3, 64, 64))
    assert images == [5, 2, 2, 1]


# ---------------------------------------------------------------------------------------- where it does nothing


def test_the_environment_turns_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "0")
    model = small()
    assert kernels.accelerate(model, inference=True) == ["no kernels: HCNET_KERNELS=0"]
    assert all(type(module).__module__.startswith("hcnet_cli.kernels") is False for module in model.modules())


def test_other_devices_and_other_networks_are_left_alone() -> None:
    assert kernels.accelerate(small(device="meta")) == [
        "no kernels: they are measured on the CPU only, the model is on meta"
    ]
    assert kernels.accelerate(nn.Sequential(nn.Linear(2, 2))) == ["no kernels: the model contains no HcNet"]
    around = nn.ModuleDict({"backbone": small(), "head": nn.Linear(4, 4)})
    kernels.accelerate(around, inference=True)
    assert type(around["head"]) is nn.Linear


# ---------------------------------------------------------------------------------------- copies, casts, programs


def test_copies_and_pickles() -> None:
    fast, x = accelerated(reparameterize_model(small().eval()), inference=True), torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        expected = fast(x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
        with torch.inference_mode():
            assert torch.equal(twin(x), expected)


def test_packed_weights_follow_the_weights() -> None:
    """load_state_dict, an optimizer step and a cast reach a model that has already run."""
    model, other, x = small().eval(), small().eval(), torch.randn(3, 3, 32, 32)
    nn.init.normal_(other.stages[0].blocks[0].refinement.fc1.weight)
    fast = accelerated(model, inference=True)
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(other.state_dict())
        assert_near([fast(x)], [other(x)], 1e-5)
        for both in (fast, other):
            both.stages[0].blocks[0].refinement.fc1.weight.mul_(2)
        assert_near([fast(x)], [other(x)], 1e-5)
        assert_near([fast.double()(x.double())], [other.double()(x.double())], 1e-10)
        assert_near([fast.bfloat16()(x.bfloat16())], [other.bfloat16()(x.bfloat16())], 0.05)


def test_accelerated_twice_and_for_training_first() -> None:
    model, x = small().eval(), torch.randn(3, 3, 32, 32)
    fast = accelerated(accelerated(model), inference=True)
    with torch.inference_mode():
        assert_near([fast(x)], [model(x)], 1e-5)
        assert_near([accelerated(fast, inference=True)(x)], [fast(x)], 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripted_and_traced() -> None:
    model, x = small().eval(), torch.randn(3, 3, 64, 64)
    fast = accelerated(model, inference=True)
    traced = torch.jit.trace(fast, x)
    with torch.inference_mode():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(fast)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(dynamic: bool, training: bool) -> None:
    torch._dynamo.reset()
    fast = accelerated(small().train(training), inference=not training)
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.set_grad_enabled(training):
        for batch in (3, 5):
            x = torch.randn(batch, 3, 64, 48)
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_export_with_any_batch_and_size(folded: bool, fast: bool) -> None:
    model = timm.create_model("hcnet_pico").eval()
    model = reparameterize_model(model) if folded else model
    if fast:
        kernels.accelerate(model, inference=True)
    batch = torch.export.Dim("batch", max=4096)
    height, width = (torch.export.Dim(name, min=33, max=4096) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for shape in ((1, 64, 64), (3, 80, 48), (5, 97, 120)):
            x = torch.randn(shape[0], 3, *shape[1:])
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- memory and folding


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


def test_a_training_step_needs_less_memory() -> None:
    model = HcNet(num_classes=5, depths=(2, 2), dims=(16, 32)).train()
    x = torch.randn(8, 3, 64, 64)

    def peak(model: nn.Module) -> int | None:
        step(model, x)
        return profile.peak_allocation(lambda: step(model, x), torch.device("cpu"))

    assert peak(accelerated(model)) < 0.7 * peak(model)


def test_a_plain_block_keeps_less_than_the_literal_form() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last).requires_grad_()

    def saved(block: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        return saved_bytes(lambda: block(x), parameters)

    assert saved(HcBlock(16)) < 1.01 * saved(LiteralBlock(16, 5))


def test_weights_cannot_slip_into_a_folded_model() -> None:
    model = small()
    with pytest.raises(RuntimeError, match="Missing key"):
        reparameterize_model(model).load_state_dict(model.state_dict())


def test_a_folded_model_trains_on_and_is_traced() -> None:
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    folded = reparameterize_model(reparameterize_model(model))
    out = folded(x)
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())
    torch.testing.assert_close(torch.jit.trace(folded, x)(x), out)
