"""Lets the torchvision of PyPI be imported beside a PyTorch for CPUs.

Its compiled part is for CUDA and is not loaded; its Python part describes two operators of it,
which have to be there. SGLang imports it for images, which the tests do not have.
"""

import importlib.abc
import sys


class Before(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first imported."""

    def find_spec(self, name, path=None, target=None):
        del path, target
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            KEPT.append(self)
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


KEPT = []
sys.meta_path.insert(0, Before())
