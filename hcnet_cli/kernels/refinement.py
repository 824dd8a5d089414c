"""The refinement with less memory: its hidden maps are R times as large as any other map of the network.

Nothing of the layer is restated. With gradients, what it computes after fc1 is recomputed in the backward pass by
torch.utils.checkpoint; without, chunks of images go through the layer's own forward, so that hidden maps stay in the
processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from hcnet_cli.kernels.support import PlainWhenScripted, on_cpu
from hcnet_cli.models.hcnet import RefinementApproximation

CHUNK_ELEMENTS = 2**21  # of a hidden map; 8 MB in float32
CHECKPOINT_ELEMENTS = 2**19  # hidden maps up to this size are not recomputed: that would cost more than their memory


def images_per_chunk(u: Tensor, hidden: int, elements: int = CHUNK_ELEMENTS) -> int:
    """How many images of maps [B, C, H, W] to compute at a time, in chunks of nearly equal size.

    elements: Of the hidden maps of one chunk, at most (but at least one image).
    """
    most = max(1, elements // (u.shape[2] * u.shape[3] * hidden))
    chunks = -(-len(u) // most)
    return -(-len(u) // max(1, chunks))


class LeanRefinement(PlainWhenScripted, RefinementApproximation):
    """Recomputation in training, chunks in inference."""

    plain = RefinementApproximation
    chunk_elements = CHUNK_ELEMENTS
    checkpoint_elements = CHECKPOINT_ELEMENTS

    @staticmethod
    def example(layer: RefinementApproximation, generator: torch.Generator) -> Tensor:
        return torch.randn(3, layer.fc1.in_features, 5, 4, generator=generator).to(memory_format=torch.channels_last)

    def forward(self, u: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not on_cpu(u):
            return super().forward(u)
        images = images_per_chunk(u, self.fc2.in_features, self.chunk_elements)
        several = len(u) > images
        if torch.compiler.is_compiling():  # a graph for any batch size has no number of chunks
            several = statically_known_true(several)
        if not several:
            return super().forward(u)
        return torch.cat([super(LeanRefinement, self).forward(part) for part in u.split(images)])

    def contract(self, hidden: Tensor) -> Tensor:
        recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling() and on_cpu(hidden)
        if not recompute or hidden.numel() <= self.checkpoint_elements:
            return super().contract(hidden)
        # Non-reentrant: recomputation stops once fc2's input is there, so fc2 is not computed again.
        return checkpoint(super().contract, hidden, use_reentrant=False, preserve_rng_state=False)
