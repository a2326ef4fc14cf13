"""Suppression inside an ONNX graph: of many overlapping boxes of one object only the best leaves the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ROTATED = 5  # times max_det anchors are looked at where all are compared with all


class Suppressed(nn.Module):
    """A network whose boxes are suppressed as Ultralytics' prediction does it: each keeps its best class only.

    The first output becomes (n, detections, 6 + more), best first: x1, y1, x2, y2, score, class, and what else the
    network says of a box; of oriented boxes x, y, width, height, score, class, angle. Where there are fewer
    detections, rows of zeros follow. `YOLO(x.onnx)` of stock Ultralytics reads it. Any batch size can be dynamic.

    Args:
        network: what `torch_runner.inference_network` returned, without an end-to-end head.
        classes: how many it knows.
        rotated: its boxes are oriented; of those, only the best 5 · max_det anchors are looked at, as in stock exports.
        conf: least score of a detection.
        iou: boxes of one class that overlap by more are one object.
        max_det: how many detections there may be in an image.
    """

    def __init__(self, network: nn.Module, classes: int, rotated: bool, conf: float, iou: float, max_det: int) -> None:
        super().__init__()
        self.network, self.classes, self.rotated = network, classes, rotated
        self.conf, self.iou, self.max_det = conf, iou, max_det

    def forward(self, images: torch.Tensor) -> Any:
        """Return the network's outputs for images (n, 3, height, width), the first one suppressed."""
        outputs = self.network(images)
        raw, others = (outputs[0], outputs[1:]) if isinstance(outputs, tuple) else (outputs, ())
        looked_at = _ROTATED * self.max_det if self.rotated else self.max_det
        # Rows of zeros behind, so that there are always enough to choose from.
        raw = nn.functional.pad(raw.transpose(1, 2), (0, 0, 0, looked_at))  # (n, anchors, 4 + classes + more)
        scores, classes = raw[..., 4 : 4 + self.classes].max(-1)
        kept = self._rotated(raw, scores, classes, looked_at) if self.rotated else self._upright(raw, scores, classes)
        scores, best = kept.topk(self.max_det, dim=1)
        boxes = raw[..., :4] if self.rotated else _corners(raw)
        label, more = classes[..., None].to(raw.dtype), raw[..., 4 + self.classes :]
        rows = torch.cat((boxes, kept[..., None], label, more), 2)
        rows = rows.gather(1, best[..., None].expand(-1, -1, rows.shape[2])) * (scores > 0).to(raw.dtype)[..., None]
        return (rows, *others) if others else rows

    def _upright(self, raw: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return the scores (n, anchors), zero for what is suppressed."""
        of_class = torch.arange(self.classes)[None, :, None] == classes[:, None, :]
        found = _NonMaxSuppression.apply(
            _corners(raw), scores[:, None] * of_class.to(scores.dtype), self.max_det, self.iou, self.conf
        )
        kept = torch.zeros_like(scores)
        image, anchor = found[:, 0], found[:, 2]
        return kept.index_put((image, anchor), scores[image, anchor])

    def _rotated(self, raw: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
        """Return the scores (n, anchors), zero for what is suppressed: that which overlaps with a better one."""
        top, place = scores.topk(count, dim=1)
        boxes = torch.cat((raw[..., :4], raw[..., -1:]), 2)
        boxes = boxes.gather(1, place[..., None].expand(-1, -1, 5))
        label = classes.gather(1, place)
        overlaps = (probabilistic_iou(boxes) > self.iou) & (label[:, :, None] == label[:, None, :])
        rank = torch.arange(count)
        better = (overlaps & (rank[:, None] < rank[None, :])).to(top.dtype).sum(1)
        top = top * ((better < 0.5) & (top > self.conf)).to(top.dtype)
        return torch.zeros_like(scores).scatter(1, place, top)


def _corners(raw: torch.Tensor) -> torch.Tensor:
    centre, half = raw[..., :2], raw[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), -1)


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX' operator NonMaxSuppression for tracing; what it returns in PyTorch is of the right shape, no more."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        boxes: torch.Tensor,
        scores: torch.Tensor,  # noqa: ARG004
        max_det: int,  # noqa: ARG004
        iou: float,  # noqa: ARG004
        conf: float,  # noqa: ARG004
    ) -> torch.Tensor:
        return torch.zeros((len(boxes), 3), dtype=torch.int64)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, max_det: int, iou: float, conf: float) -> Any:
        limits = (torch.tensor([max_det]), torch.tensor([iou]), torch.tensor([conf]))
        return g.op("NonMaxSuppression", boxes, scores, *(g.op("Constant", value_t=limit) for limit in limits))


def probabilistic_iou(boxes: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Return how much oriented boxes overlap, each with each, as Ultralytics' suppression measures it.

    Boxes are taken for Gaussians, and one minus their Hellinger distance stands for the IoU (Llerena et al.,
    "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union for Object Detection", 2021).

    Args:
        boxes: (n, boxes, 5): centre x, centre y, width, height, angle in radians.
        eps: keeps divisions and roots defined.

    Returns:
        (n, boxes, boxes), 0 to 1.
    """
    x, y, width, height, angle = boxes.unbind(-1)
    along, across = width.square() / 12, height.square() / 12
    cos, sin = angle.cos(), angle.sin()
    a = along * cos.square() + across * sin.square()
    b = along * sin.square() + across * cos.square()
    c = (along - across) * cos * sin
    sum_a, sum_b, sum_c = (value[:, :, None] + value[:, None, :] for value in (a, b, c))
    dx, dy = (value[:, :, None] - value[:, None, :] for value in (x, y))
    determinant = sum_a * sum_b - sum_c.square()
    distance = (sum_a * dy.square() + sum_b * dx.square()) / (determinant + eps) / 4
    distance = distance - sum_c * dx * dy / (determinant + eps) / 2  # the mixed term, with the sign of -dx·dy
    own = (a * b - c.square()).clamp(min=0)
    spread = determinant / (4 * (own[:, :, None] * own[:, None, :]).sqrt() + eps) + eps
    bhattacharyya = (distance + spread.log() / 2).clamp(eps, 100.0)
    return 1 - (1.0 - (-bhattacharyya).exp() + eps).sqrt()
