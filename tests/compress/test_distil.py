"""The terms of distillation against hand-computed values and autograd, and the training that they are wired into."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel

from compress import finetune
from compress.checkpoint import build_model, load_model, save_model
from compress.errors import CheckpointError, SettingsError
from compress.manifest import MANIFEST, read_json
from compress.settings import Finetune
from compress.train import Common
from compress.training.distil import DISTIL, Distillation, box_distribution, channel_wise
from compress.training.teacher import check_teacher
from topologies import randomised

TERMS = {"cwd": 2.0, "cwd_temperature": 4.0, "ld": 0.5, "ld_temperature": 10.0}
NO_TERMS = {**TERMS, "cwd": 0.0, "ld": 0.0}


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# The terms.


def test_cwd_by_hand() -> None:
    """Two channels of three positions, τ 2: the first looks elsewhere, the second is the same but for a constant."""
    p, q = [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]
    teacher = torch.tensor([[2 * math.log(v) for v in p], [1.0, 2.0, 3.0]]).view(1, 2, 1, 3)
    student = torch.tensor([[2 * math.log(v) for v in q], [6.0, 7.0, 8.0]]).view(1, 2, 1, 3)
    assert channel_wise(student, teacher, 2.0).item() == pytest.approx(4.0 * divergence(p, q) / 2, rel=1e-5)


def test_ld_by_hand() -> None:
    """One positive anchor of probability 0.8 with one side that differs, one of 0.5 that agrees, one background."""
    p, q, tau = [0.7, 0.3], [0.4, 0.6], 10.0
    teacher, student = torch.zeros(1, 8, 3), torch.zeros(1, 8, 3)
    teacher[0, 2:4, 0] = torch.tensor([tau * math.log(v) for v in p])  # bins of the second side
    student[0, 2:4, 0] = torch.tensor([tau * math.log(v) for v in q])
    student[0, :, 2] = torch.arange(8.0)  # nobody asks what it says of background
    scores = torch.tensor([[[0.8, 0.5, 0.09], [0.1, 0.2, 0.01]]]).logit()
    expected = tau**2 * (divergence(p, q) / 4) * 0.8 / (0.8 + 0.5)
    assert box_distribution(student, teacher, scores, tau).item() == pytest.approx(expected, rel=1e-5)


def test_ld_of_an_image_without_objects_is_zero() -> None:
    scores = torch.full((1, 2, 3), -9.0)
    assert box_distribution(torch.randn(1, 8, 3), torch.randn(1, 8, 3), scores, 10.0).item() == 0.0


def test_the_gradient_of_cwd_is_the_difference_of_the_distributions() -> None:
    """d/ds of τ²·KL(p‖softmax(s/τ)) is τ·(q - p): here over C = 3 channels and a batch of 2."""
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(2, 3, 4, 5).requires_grad_(), torch.randn(2, 3, 4, 5), 4.0
    channel_wise(student, teacher, tau).backward()
    p, q = ((v.flatten(2) / tau).softmax(2) for v in (teacher, student.detach()))
    assert student.grad is not None
    torch.testing.assert_close(student.grad.flatten(2), tau * (q - p) / (2 * 3))


def test_the_gradient_of_ld_pulls_only_at_positives() -> None:
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(1, 16, 6).requires_grad_(), torch.randn(1, 16, 6), 10.0
    scores = torch.tensor([[[0.9, 0.05, 0.4, 0.02, 0.1001, 0.0999]]]).logit()
    box_distribution(student, teacher, scores, tau).backward()
    weight = torch.tensor([0.9, 0.0, 0.4, 0.0, 0.1001, 0.0])
    p, q = ((v.view(1, 4, 4, 6) / tau).softmax(2) for v in (teacher, student.detach()))
    assert student.grad is not None
    expected = tau * (q - p) / 4 * weight / weight.sum()
    torch.testing.assert_close(student.grad.view(1, 4, 4, 6), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_terms_are_computed_in_fp32_whatever_amp_gives(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 8, 64, 64).to(kind), 30 * torch.randn(1, 8, 64, 64).to(kind)
    for found, expected in (
        (channel_wise(student, teacher, 4.0), channel_wise(student.float(), teacher.float(), 4.0)),
        (
            box_distribution(student.flatten(2), teacher.flatten(2), teacher.flatten(2), 1.0),
            box_distribution(student.flatten(2).float(), teacher.flatten(2).float(), teacher.flatten(2).float(), 1.0),
        ),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


# The terms in a model of student and teacher.


@pytest.fixture
def pair(dense: Path, pruned: Path) -> Any:
    """Ultralytics' model of a pruned student and its dense teacher."""
    torch.manual_seed(0)
    student: Any = copy.deepcopy(load_model(pruned))
    student.args = get_cfg(overrides={"imgsz": 64, "dis": 6.0})
    student.requires_grad_(True)
    made = DistillationModel(str(dense), student).train()
    confident(made.teacher_model)
    return made


def confident(teacher: Any) -> None:
    """Let an untrained teacher find objects: its classes have a probability of about a half everywhere."""
    for tower in teacher.model[-1].cv3:
        tower[-1].bias.data.zero_()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.3]])
    return {
        "img": torch.rand(2, 3, 64, 64),
        "cls": torch.tensor([[1.0], [2.0]]),
        "bboxes": boxes,
        "batch_idx": torch.tensor([0.0, 1.0]),
    }


def test_without_terms_the_loss_is_that_of_ultralytics(pair: Any) -> None:
    expected, items = copy.deepcopy(pair).loss(batch())
    found, ours = Distillation(pair, NO_TERMS)(batch())
    torch.testing.assert_close(found, expected)
    assert ours.keys() == items.keys()


def test_terms_are_added_with_their_weights_for_a_pruned_student(pair: Any) -> None:
    plain, _ = copy.deepcopy(pair).loss(batch())
    once, items = Distillation(copy.deepcopy(pair), TERMS)(batch())
    twice, _ = Distillation(copy.deepcopy(pair), {**TERMS, "cwd": 4.0, "ld": 1.0})(batch())
    torch.testing.assert_close(once[:-2], plain)
    torch.testing.assert_close(twice[-2:], 2 * once[-2:])
    torch.testing.assert_close(once[-2:], 2 * torch.cat([items["cwd_loss"], items["ld_loss"]]))  # times the batch
    assert (once[-2:] > 0).all()


def test_the_terms_train_student_and_projectors_but_not_the_teacher(pair: Any) -> None:
    loss, _ = Distillation(pair, TERMS)(batch())
    loss[-2:].sum().backward()  # of the two terms alone
    moved = {name for name, p in pair.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.partition(".")[0] for name in moved} == {"student_model", "projector"}
    last = len(pair.student_model.model) - 1
    assert any(name.startswith(f"student_model.model.{last}.cv2") for name in moved)


def test_switched_off_the_teacher_is_not_asked(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = Distillation(copy.deepcopy(pair), TERMS)(batch())
    expected, _ = copy.deepcopy(pair.student_model).loss(batch())
    wired = Distillation(pair, TERMS)
    wired.active = False
    monkeypatch.setattr(pair.teacher_model, "forward", None)
    found, items = wired(batch())
    torch.testing.assert_close(found, expected)
    assert items.keys() == before.keys()  # a log keeps its columns
    assert [items[f"{name}_loss"].item() for name in ("dis", "cwd", "ld")] == [0.0, 0.0, 0.0]


# The teacher.


def checked(student: Path, teacher: Path, data: Path, imgsz: int = 64, **settings: float) -> str:
    given = Finetune(epochs=1, **settings)  # type: ignore[arg-type]
    with pytest.raises(SettingsError) as caught:
        check_teacher(load_model(student), teacher, data, given, imgsz)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_teacher_that_does_not_fit_is_refused(
    dense: Path, pruned: Path, narrow: Path, tiny_data: Path, tmp_path: Path
) -> None:
    check_teacher(load_model(pruned), dense, tiny_data, Finetune(epochs=1, ld=1.0), 64)
    other = tmp_path / "other.pt"
    save_model(build_model(str(narrow), nc=4), other, {"imgsz": 64})
    assert "knows 4 classes (0, 1, 2, …)" in checked(pruned, other, tiny_data)
    assert "was trained at imgsz 64, the student is at 96: give imgsz 64, or train the teacher at 96" in checked(
        pruned, dense, tiny_data, imgsz=96
    )
    coarse: Any = build_model(str(narrow), nc=6)
    coarse.stride = coarse.stride * 2
    save_model(coarse, other, {})
    assert "predicts at strides" in checked(pruned, other, tiny_data)
    flat: Any = load_model(pruned)
    flat.model[-1].reg_max = 1
    save_model(flat, other, {})
    assert "ld needs equal distributions of box sides, the student has 16 bins and the teacher 1" in checked(
        pruned, other, tiny_data, ld=1.0
    )
    check_teacher(load_model(pruned), other, tiny_data, Finetune(epochs=1), 64)


def test_a_teacher_needs_weights_and_every_student_is_checked(
    dense: Path, narrow: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"narrow\.yaml is an architecture without weights"):
        check_teacher(load_model(dense), narrow, tiny_data, Finetune(epochs=1), 64)
    other = tmp_path / "other.pt"
    save_model(build_model(str(narrow), nc=4), other, {"imgsz": 64})
    with pytest.raises(SettingsError, match="knows 4 classes"):  # the student is one of Ultralytics' own names
        finetune.finetune(
            Path("yolov8n.yaml"), other, tiny_data, Finetune(epochs=1), Common(imgsz=64), tmp_path / "out"
        )


# The training.


def test_a_trainer_is_told_of_terms_where_there_are_any() -> None:
    assert Finetune(epochs=3).terms == {}
    told = {"cwd": 0.0, "cwd_temperature": 4.0, "ld": 0.5, "ld_temperature": 10.0, "distil_off_epochs": 0}
    assert Finetune(epochs=3, ld=0.5).terms == told


@pytest.fixture(scope="module")
def tuned(dense: Path, pruned: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of three epochs, the last without its teacher, which is wider than the student ever was."""
    folder = tmp_path_factory.mktemp("tuned")
    wide = folder / "wide.pt"
    torch.manual_seed(0)
    architecture = {"nc": 6, "backbone": [], "head": []} | _wide(dense)
    teacher = randomised(build_model(architecture))
    confident(teacher)
    save_model(teacher, wide, {"imgsz": 64})
    args = {"nbs": 8, "warmup_epochs": 0.0, "mosaic": 0.0}
    settings = Finetune(epochs=3, batch=8, cwd=1.0, ld=1.0, distil_off_epochs=1, args=args)  # type: ignore[arg-type]
    finetune.finetune(pruned, wide, tiny_data, settings, Common(imgsz=64, workers=0), folder / "stage")
    return folder / "stage"


def _wide(dense: Path) -> dict[str, Any]:
    """Return the architecture of a checkpoint with half as many channels again."""
    content: Any = copy.deepcopy(load_model(dense).yaml)
    for row in content["backbone"] + content["head"]:
        if row[2] in ("Conv", "C2f"):
            row[3][0] = row[3][0] * 3 // 2
    return content


def test_a_training_distils_by_all_terms_until_it_is_told_to_stop(tuned: Path) -> None:
    import csv

    with (tuned / "training" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for name in ("dis", "cwd", "ld"):
        values = [float(row[f"train/{name}_loss"]) for row in rows]
        assert min(values[:2]) > 0.0, name
        assert values[2] == 0.0, name
    assert read_json(tuned / DISTIL)["distil_off_epochs"] == 1
    assert read_json(tuned / MANIFEST)["config"]["cwd"] == 1.0


def test_what_is_left_opens_without_teacher_and_terms(tuned: Path, pruned: Path) -> None:
    for path in (tuned / "model.pt", tuned / "training" / "weights" / "last.pt"):
        model: Any = load_model(path)
        assert "loss" not in vars(model)
        student: nn.Module = getattr(model, "student_model", model)
        shapes = {name: value.shape for name, value in load_model(pruned).state_dict().items()}
        assert {name: value.shape for name, value in student.state_dict().items()} == shapes
