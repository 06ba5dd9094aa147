"""What a restricted sight makes of a prompt's images before the vision tower."""

from typing import Any

import pytest
import torch
from PIL import Image

from cluster.errors import DataError
from rl.images import canonicalise
from rl.policy import load_processor, resolve_model
from rl.sight import Sight, view_inputs, views
from rl.types import Prompt

IMAGES = [canonicalise(Image.new("RGB", (40, 32), colour), "test") for colour in ("red", "blue")]
PROMPT = Prompt.make([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], IMAGES)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(resolve_model("rl/world/base"))


def test_views_are_equal_where_the_pixels_are() -> None:
    clear = views(PROMPT, Sight(seed=1, threshold=0.5, noise=0))
    assert clear == views(PROMPT, Sight(seed=2, threshold=0.9, noise=0)), "masks do not change the pixels"
    noisy = views(PROMPT, Sight(seed=1, threshold=0.5, noise=500))
    assert noisy != views(PROMPT, Sight(seed=2, threshold=0.5, noise=500))
    assert noisy[0].seed != noisy[1].seed, "each image has noise of its own"


def test_only_noisy_views_change_pixels_and_the_same_way_each_time(processor: Any) -> None:
    clear = view_inputs(views(PROMPT, Sight(1, 0, 0)), processor)["pixel_values"]
    plain = processor.image_processor(images=[image.open() for image in IMAGES], return_tensors="pt").pixel_values
    assert torch.equal(clear, plain)
    noisy = view_inputs(views(PROMPT, Sight(1, 0, 500)), processor)["pixel_values"]
    assert torch.equal(noisy, view_inputs(views(PROMPT, Sight(1, 0, 500)), processor)["pixel_values"])
    assert not torch.equal(noisy, view_inputs(views(PROMPT, Sight(2, 0, 500)), processor)["pixel_values"])
    last_alone = view_inputs(views(PROMPT, Sight(1, 0, 500))[1:], processor)["pixel_values"]
    assert torch.equal(noisy[1:], last_alone), "noise does not depend on the batch"


def test_pixels_that_are_not_laid_out_by_image_are_refused() -> None:
    class Patches:
        """An image processor that flattens all images into one list of patches."""

        @staticmethod
        def image_processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(64 * len(images), 1176)}

    with pytest.raises(DataError, match="LLaVA"):
        view_inputs(views(PROMPT, Sight(1, 0, 0)), Patches())  # type: ignore[arg-type]
