"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Set-up copies this file, and a `.pth` file that imports it, into an environment in which
`import torchvision` fails because its compiled operators cannot be loaded. Only torchvision's Python
half is used here, and that half needs nothing but the schemas of two operators. Every process
(Ray and vLLM start their own) passes through `site`, so the hook lives there and not in product code.
"""

import sys
from importlib.abc import MetaPathFinder


class _DeclareOperators(MetaPathFinder):
    """Declares the two schemas just before torchvision is imported; imports nothing itself before that."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import define

            define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


sys.meta_path.insert(0, _DeclareOperators())
