"""How much of its images a model may see while it writes (BDHS, arXiv 2407.02477, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import DataError
from rl.images import CanonicalImage
from rl.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin

DIFFUSION_STEPS = 1000


@dataclass(frozen=True)
class Sight:
    """How much of its images a model may see while it writes: of each image's embeddings one in 1 / (1 - threshold) at
    random, or the pixels under diffusion noise."""

    seed: int
    """Settles which embeddings are seen, and the noise."""
    threshold: float
    """An embedding is seen where its draw from U(0, 1) is at or above this; 0 sees all, 1 none."""
    noise: int
    """Diffusion step of the pixels, see `diffuse`; 0 leaves them as they are."""

    def visible(self, count: int, image: int = 0) -> np.ndarray:
        """Which of the `count` embeddings of the prompt's image number `image` are seen: bool [count]."""
        return np.random.default_rng([self.seed, image]).random(count) >= self.threshold


@dataclass(frozen=True)
class Continuation:
    """An answer that is to be written on from its beginning, under restricted sight."""

    prompt: Prompt
    prefix: str
    """What the assistant's turn begins with; it never ends in a space."""
    sight: Sight
    to_sentence_end: bool
    """Stop at the first full stop, which is kept in the text, instead of at the end of the turn."""

    @property
    def id(self) -> str:
        """Tells the continuations of one prompt apart, whatever batch they are in."""
        return f"{self.prompt.id}:{self.sight.seed}:{self.prefix}"


@dataclass(frozen=True)
class View:
    """One image, as noisy as a sight makes it. Equal views have equal embeddings."""

    image: CanonicalImage
    noise: int
    seed: int


def views(prompt: Prompt, sight: Sight) -> list[View]:
    """The prompt's images as noisy as `sight` makes them, each with noise of its own."""
    if not sight.noise:
        return [View(image, 0, 0) for image in prompt.images]
    return [View(image, sight.noise, sight.seed + index) for index, image in enumerate(prompt.images)]


def view_inputs(images: Sequence[View], processor: "ProcessorMixin") -> "dict[str, Tensor]":
    """What the vision tower takes for some views: `pixel_values` with one row for each, and sizes if it wants any.

    Raises:
        DataError: the model's pixels are not laid out by image.
    """
    inputs: dict[str, Any] = dict(
        processor.image_processor(images=[view.image.open() for view in images], return_tensors="pt")
    )
    pixels = inputs["pixel_values"]
    if len(pixels) != len(images):
        raise DataError("policy.model: restricted sight needs a model of the LLaVA family, with one image a row")
    for row, view in enumerate(images):
        if view.noise:
            pixels[row] = diffuse(pixels[row], view.noise, view.seed)
    return inputs


def noise_scale(step: int) -> float:
    """What is left of the image at a step of diffusion, 0 to 999: sqrt(alpha_bar); 1 at step 0, which adds no noise.

    alpha_bar is the product of 1 - beta_k over k = 0 … step, beta_k = sigmoid(-6 + 12 k / 999) * (0.005 - 1e-5) + 1e-5
    (the schedule of POVID's code, arXiv 2402.11411).
    """
    if step == 0:
        return 1.0
    k = np.arange(step + 1)
    beta = (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * k / (DIFFUSION_STEPS - 1))) + 1e-5
    return float(np.sqrt(np.prod(1 - beta)))


def diffuse(pixels: "Tensor", step: int, seed: int) -> "Tensor":
    """Preprocessed pixels, of any shape, under the noise of a diffusion step; the same for the same seed.

    sqrt(alpha_bar) * pixels + sqrt(1 - alpha_bar) * N(0, 1); step 0 gives the pixels themselves.
    """
    if step == 0:
        return pixels
    import torch

    # Drawn on the CPU in one precision, so that every device and precision gets the same noise.
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels.device)
    scale = noise_scale(step)
    return (scale * pixels.float() + (1 - scale**2) ** 0.5 * noise).to(pixels.dtype)
