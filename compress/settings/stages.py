"""The sections of training and pruning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.settings.budget import Budget
from compress.settings.names import LATENCY_TARGETS, TARGETS, Importance, Runtime, Share, Variant
from compress.settings.strict import Strict


class Training(Strict):
    """One training: Ultralytics' names, Ultralytics' meanings."""

    epochs: int = Field(ge=0)
    batch: int = Field(default=16, ge=1)
    optimizer: str = "auto"
    lr0: float = Field(default=0.01, gt=0.0)
    lrf: float = Field(default=0.01, gt=0.0)
    cos_lr: bool = False
    warmup_epochs: float = Field(default=3.0, ge=0.0)
    close_mosaic: int = Field(default=10, ge=0)
    amp: bool = True
    args: dict[str, Any] = Field(default_factory=dict, description="any other Ultralytics training argument")

    @model_validator(mode="after")
    def _said_once(self) -> Training:
        if twice := next((name for name in self.args if name in self.model_fields_set), None):
            raise ValueError(
                f"'{twice}' is a setting of its own, beside args (--{twice.replace('_', '-')}): do not give it in both"
            )
        return self


OPTIMIZERS = ("auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
_RESCALING = {name.lower() for name in OPTIMIZERS} - {"sgd", "musgd"}


class Sparsity(Training):
    """Sparsity training: a training with an L1 penalty on the batch-norm scales γ of prunable channels."""

    optimizer: str = "SGD"
    sr: Annotated[float, Field(ge=0.0)] | Literal["auto"] = Field(
        default=1e-4, description="penalty λ, added to the gradient of γ as λ·γ/‖γ‖ per coupled unit; or auto"
    )
    share: Share | None = Field(
        default=None, description="share of γ that auto brings near zero; what `prune` will remove when not given"
    )
    sr_decay: float = Field(
        default=0.1, gt=0.0, le=1.0, description="share of λ that is left at the last epoch (linear)"
    )
    fade: bool = Field(default=False, description="choose the channels that `prune` removes early, and fade them out")
    start: Literal["train", "model"] = Field(
        default="train", description="start from the trained model or from `model` itself"
    )

    @property
    def from_trained(self) -> bool:
        """Whether what follows starts from the trained model: without a sparsity training there is no other."""
        return self.start == "train" or self.epochs == 0

    @model_validator(mode="after")
    def _share_of_auto(self) -> Sparsity:
        if self.share is not None and self.sr != "auto":
            raise ValueError(f"share goes with sr: auto, sr is {self.sr:g}")
        if self.sr == "auto" and self.changed("sr_decay"):
            raise ValueError("sr_decay goes with a number for sr: auto sets λ of each epoch itself")
        if self.sr == "auto" and self.fade:
            raise ValueError("sr: auto and fade: true each choose channels of their own: leave one of them out")
        if self.sr == "auto" and self.epochs == 1:
            raise ValueError("sr: auto watches an epoch before it pulls: give epochs of 2 at least")
        return self

    @model_validator(mode="after")
    def _pull_of_sr(self) -> Sparsity:
        if self.sr != 0.0 and str(self.args.get("optimizer", self.optimizer)).lower() in _RESCALING:
            raise ValueError(
                "sr goes with optimizer: SGD; Adam and its kin, which auto may take, divide the pull by its own "
                "size, and λ means nothing: leave optimizer out, or give sr: 0"
            )
        return self


_TERMS = ("cwd", "cwd_temperature", "ld", "ld_temperature", "distil_off_epochs")


class Finetune(Training):
    """Fine-tuning of the pruned model, with the dense model as the teacher unless told otherwise."""

    distill: bool = Field(default=True, description="distil from the dense model, or from `teacher`")
    teacher: str | None = Field(default=None, description="a checkpoint to distil from in place of the dense model")
    dis: float = Field(default=6.0, ge=0.0, description="weight of Ultralytics' feature distillation")
    cwd: float = Field(default=0.0, ge=0.0, description="weight of channel-wise distillation of the same features")
    cwd_temperature: float = Field(default=4.0, gt=0.0)
    ld: float = Field(default=0.0, ge=0.0, description="weight of the distillation of box distributions")
    ld_temperature: float = Field(default=10.0, gt=0.0)
    distil_off_epochs: int = Field(default=0, ge=0, description="last epochs, in which the teacher is not asked")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Finetune:
        if self.distill and not (self.dis or self.cwd or self.ld):
            raise ValueError("dis, cwd and ld are all 0: leave out the teacher (distill: false)")
        if not self.distill and (asked := self.changed("teacher", *_TERMS)):
            raise ValueError(f"{asked} goes with distill: true")
        for name in ("cwd", "ld"):
            if getattr(self, name) == 0.0 and self.changed(f"{name}_temperature"):
                raise ValueError(f"{name}_temperature goes with {name} above 0")
        if self.distill and 0 < self.epochs <= self.distil_off_epochs:
            raise ValueError(
                f"distil_off_epochs {self.distil_off_epochs} must be below epochs {self.epochs}: "
                "the teacher would never be asked"
            )
        return self

    @property
    def terms(self) -> dict[str, float]:
        """Return what a trainer must know beside Ultralytics' arguments; empty where that is nothing."""
        if not (self.cwd or self.ld or self.distil_off_epochs):
            return {}
        return {name: getattr(self, name) for name in _TERMS}


def _times(value: Any) -> Any:
    """Read "2x" as 2.0."""
    import re

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[x×]?", value) if isinstance(value, str) else None
    return float(found[1]) if found else value


def _such_as(pattern: str, example: str) -> BeforeValidator:
    """Return a check that a value is text of a form, which its message shows by an example."""

    def check(value: Any) -> Any:
        import re

        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"must be such as {example}, got {value!r}")
        return value

    return BeforeValidator(check)


_REPAIRS = ("fold", "recalibrate_images", "reconstruct_images")
_OF_LATENCY = " or ".join(", ".join(LATENCY_TARGETS).rsplit(", ", 1))


class Prune(Strict):
    """How much to remove (one of `TARGETS`), by which importance, under which budget.

    The latency of `latency`, `speedup` and `keep_importance` is predicted by a latency table of `benchmark.profile` and
    measured after the cut. Of the repairs after it (`fold`, `recalibrate_images`, `reconstruct_images`) the val mAP
    chooses.
    """

    percent: float | None = Field(default=None, ge=0.0, lt=1.0, description="share of the prunable channels to remove")
    macs: Share | None = Field(default=None, description="MACs of the pruned model as a share of the dense model's")
    params: Share | None = Field(
        default=None, description="parameters of the pruned model as a share of the dense model's"
    )
    latency: Annotated[str, _such_as(r"\d+(\.\d+)?\s*(ms|M)", "12ms, or 120M for instructions")] | None = None
    speedup: Annotated[float, BeforeValidator(_times), Field(gt=1.0)] | None = Field(
        default=None, description="dense latency over that of the pruned model, such as 2x"
    )
    keep_importance: Share | None = Field(
        default=None,
        description="the fastest widths that keep this share of importance: of a group's, the mean over the groups",
    )
    memory: Annotated[str, _such_as(r"\d+(\.\d+)?\s*[kMG]i?B", "8MB")] | None = Field(
        default=None, description="with a target of latency: weights and peak"
    )
    device: str = Field(default="cpu", description="of a target of latency: where the model will run")
    host: str | None = Field(default=None, description="of a target of latency: how the device is reached")
    # Excluded: by which interpreter a latency was measured makes no other cut, and finished stages stay valid.
    python: str | None = Field(
        default=None, exclude=True, description="of a target of latency: interpreter on the device"
    )
    bootstrap: bool = Field(
        default=False, exclude=True, description="of a target of latency: put missing packages into a folder there"
    )
    runtime: Runtime | Variant | None = Field(
        default=None, description="of a target of latency; the device's first one"
    )
    threads: int | None = Field(default=None, ge=1, description="of a target of latency; the device's own")
    table: str | None = Field(
        default=None, description="latency table; not given: the one that benchmark.profile wrote"
    )
    importance: Importance = "bn"
    sensitivity: str | None = Field(
        default=None, description="sensitivity.json of compress.sensitivity: what a group may lose was measured"
    )
    budget: Budget = Budget()
    fold: bool = Field(default=True, description="add what removed channels send on average to what reads them")
    recalibrate_images: int = Field(
        default=256, ge=0, description="training images that re-estimate batch-norm statistics"
    )
    reconstruct_images: int = Field(
        default=0, ge=0, description="training images on which what reads removed channels is refitted by least squares"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Prune:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(TARGETS)} is needed, got {', '.join(given) or 'none'}")
        if self.memory is not None and not self.by_latency:
            raise ValueError(f"memory goes with {_OF_LATENCY}")
        names = ("host", "python", "bootstrap", "runtime", "threads", "table")
        place = {name: getattr(self, name) or None for name in names}
        place["device"] = self.device if self.device != "cpu" else None
        if not self.by_latency and (asked := [name for name, value in place.items() if value is not None]):
            raise ValueError(
                f"{', '.join(asked)}: only with {_OF_LATENCY}; the widths that a device likes are budget: DEVICE"
            )
        return self

    def without_repairs(self) -> Prune:
        """Return what decides which channels go; how the cut model is repaired is as by default."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in _REPAIRS})

    @property
    def by_latency(self) -> bool:
        """Tell whether widths follow a latency table."""
        return any(getattr(self, name) is not None for name in LATENCY_TARGETS)
