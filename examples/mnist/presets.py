"""The presets as data: which models, trained how, attacked how, and on how many images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .attacks import PGD, SPSA, AutoAttack, Method, SimBA, Square, Threat, Transfer
from .models import Block
from .recipes import Effort, Model, cycle, from_sodef, further, sodef

__all__ = ["PRESETS", "Group", "Model", "Preset", "Probe", "Suite", "long_steps"]

TWIN = "twin"
NO_EVIDENCE = "a smoke run, not evidence"


@dataclass(frozen=True)
class Group:
    """Attacks that are run and recorded together on the first `images` test images (None: all of them).

    `gradient` says where their gradients come from: the model's "own", "around" the block on each of its routes, its
    "adjoint", that of a noisy model made "quiet" or of its draws' "directions", or "others", the models named in
    `sources`, of which "twin" is the model's own. `models` and `threats` name those that the group is for (None: all),
    `but` models that it is not for.
    """

    name: str
    attacks: tuple[Method, ...]
    images: int | None = None
    gradient: str = "own"
    sources: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    threats: tuple[str, ...] | None = None
    once: bool = False
    but: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gradient not in (known := ("own", "around", "adjoint", "quiet", "directions", "others")):
            raise ValueError(f"Group.gradient: expected one of {known}, got {self.gradient!r}")
        if len(names := [str(attack) for attack in self.attacks]) > len(set(names)):
            raise ValueError(f"Group {self.name}: two attacks have one name, and one of them would be lost: {names}")

    def covers(self, model: Model, threat: Threat) -> bool:
        """Whether this model is attacked so within this threat."""
        named = (self.models is None or model.name in self.models) and model.name not in self.but
        able = {
            "around": model.goes_around, "adjoint": model.block.has_adjoint, "quiet": model.block.noisy,
            "directions": model.block.noisy, "others": bool(self.others(model)),
        }  # fmt: skip
        return named and able.get(self.gradient, True) and (self.threats is None or str(threat) in self.threats)

    def others(self, model: Model) -> tuple[str, ...]:
        """The models whose images are shown to this one."""
        names = (model.twin if name == TWIN else name for name in self.sources)
        return tuple(name for name in dict.fromkeys(names) if name != model.name)


@dataclass(frozen=True)
class Probe:
    """How the attacks themselves are looked at, on the first `images` test images: radii by norm, numbers of steps.

    Of noisy models: `eot` says within which threats and over how many draws of the noise a gradient is averaged, as it
    is and by its directions, and `apart` how many draws of it are looked at for how far they lie apart.
    """

    images: int
    threat: Threat
    radii: tuple[tuple[str, tuple[float, ...]], ...]
    steps: tuple[int, ...]
    eot: tuple[tuple[Threat, int], ...] = ()
    apart: int = 0


@dataclass(frozen=True)
class Suite:
    """What the models are attacked with: each group within each threat."""

    threats: tuple[Threat, ...]
    groups: tuple[Group, ...]
    probe: Probe
    draws: int  # of the noise, per gradient (EOT)
    judging_draws: int  # of the noise, per verdict
    thin: int = 5  # models of further seeds are attacked on one image in so many, the first


@dataclass(frozen=True)
class Preset:
    """A whole study. None for a number of images means all of them."""

    name: str
    warning: str | None
    widths: tuple[int, int, int]
    models: tuple[Model, ...]
    suite: Suite
    primary: tuple[str, str, Threat] = ("M4", "M5", Threat("l2", 0.5))  # compared as said in advance
    drawn: tuple[str, ...] | None = None  # models that pictures show; None: all
    spectrum_points: int = 100
    train_images: int | None = None
    validation_images: int | None = None
    test_images: int | None = None

    def __post_init__(self) -> None:
        seeds: dict[str, int] = {}
        for model in self.models:
            if model.start is not None and seeds.get(model.start, 0) < model.seeds:
                raise ValueError(
                    f"preset {self.name}: {model.name} starts from {model.start} with {model.seeds} seeds, which comes "
                    f"later or has {seeds.get(model.start, 0)}"
                )
            seeds[model.name] = model.seeds
        for model in self.models:
            if model.control is not None and model.control not in seeds:
                raise ValueError(f"preset {self.name}: {model.name} is compared with {model.control}, which is missing")

    def model(self, name: str) -> Model:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)


def _models(
    features: int, fresh: tuple[int, int, int], longer: int, seeds: int = 1, others: int = 1
) -> tuple[Model, ...]:
    """The models of the study; only the epochs and the seeds of their training differ between presets.

    M3 has the paper's integration to T = 10, Adam on batches of 128, and the phases of `recipes.sodef`; M1 is M3
    without the regulariser, and at the rate 1e-3 throughout. M4 and M5 differ in p alone: same solver, start, steps
    and order of samples.
    """
    ode, noise, quiet = Block("ode"), Block("sde", p=0.1), Block("sde", p=0.0)
    first, more = (cycle("all", features, 3e-3),), from_sodef(longer)
    return (
        Model("M0", "features + head", Block("none"), None, first, seeds=max(seeds, others)),
        Model("M1", "plain ODE", ode, "M0", sodef(fresh, lr=1e-3), seeds=others),
        Model("M3", "SODEF", ode, "M0", sodef(fresh), regularised=True, seeds=seeds, control="M1"),
        Model("M4", "SODEF_0.9", noise, "M3", more, regularised=True, seeds=seeds, control="M5"),
        Model("M5", "SODEF, trained as long", quiet, "M3", more, regularised=True, seeds=seeds),
        Model("M13", "gradient masker", Block("staircase"), "M0"),
    )


# The net that transferred images come from beside a model's twin, of another kind: see `features.ConvFeatures`.
INDEPENDENT = Model(
    "M0-conv", "independent CNN", Block("none"), None, (cycle("all", 10, 3e-3),), net="conv", widths=(16, 32, 100)
)
THREATS = (Threat("l2", 0.5), Threat("l2", 1.5), Threat("linf", 0.1))
FGSM = PGD("ce", steps=1, rate=1.0, random_start=False)
SOURCES = (TWIN, INDEPENDENT.name)
RADII = (("l2", (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)), ("linf", (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)))


def long_steps(loss: str, steps: int) -> PGD:
    """PGD in steps of a quarter of the radius: they find more than short ones where many are taken, less where few."""
    return PGD(loss, steps, rate=steps / 4)


def _attacked(
    images: int | None, steps: int, sources: tuple[str, ...], threats: tuple[str, ...] | None = None, *, back: int
) -> tuple[Group, ...]:
    """White-box, bypass, the gradients of the adjoint, of a noisy model's noiseless solve and its draws' directions,
    and transfer.

    The adjoint takes four times as long as another way around and finds less: it goes `back` on so many images alone.
    """
    own, around = long_steps("margin", steps), long_steps("margin", max(1, steps // 2))
    return (
        Group("white-box", (FGSM, PGD("ce", steps), own), images, threats=threats),
        Group("bypass", (around,), images, "around", threats=threats),
        Group("adjoint", (around,), back, "adjoint", threats=threats),
        Group("noise-off", (own,), images, "quiet", threats=threats),
        Group("directions", (own,), images, "directions", threats=threats),
        Group("transfer", (Transfer(PGD("margin", steps)),), images, "others", sources, threats=threats),
    )


def _black(images: int, queries: int, threats: tuple[str, ...] | None = None, **named: Any) -> Group:
    """Attacks without any gradient: so many queries for Square, and about as many for SPSA and for SimBA."""
    attacks = Square(queries), SPSA(steps=max(2, queries // 64), samples=32), SimBA(steps=queries // 2)
    return Group("black-box", attacks, images, threats=threats, **named)


QUICK = Preset(
    name="quick",
    warning=NO_EVIDENCE,
    widths=(16, 32, 128),
    models=_models(features=3, fresh=(1, 1, 1), longer=3),
    suite=Suite(
        threats=THREATS,
        groups=(*_attacked(images=400, steps=40, sources=(TWIN,), back=100), _black(images=50, queries=500)),
        probe=Probe(100, THREATS[1], (("l2", (0.5, 1.5, 3.0)), ("linf", (0.05, 0.1, 0.3))), (40, 200)),
        draws=8,
        judging_draws=32,
    ),
)

SMOKE = replace(
    QUICK,
    name="smoke",
    models=_models(features=2, fresh=(1, 1, 1), longer=1),
    suite=Suite(
        threats=THREATS[:2],
        groups=(*_attacked(images=40, steps=5, sources=(TWIN,), back=10), _black(images=10, queries=20)),
        probe=Probe(20, THREATS[1], (("l2", (0.5, 3.0)),), (5, 10), ((THREATS[0], 4),), 16),
        draws=2,
        judging_draws=8,
    ),
    train_images=4_000,
    validation_images=1_000,
    test_images=1_000,
)

MAIN = ("M0", "M1", "M3", "M4", "M5", "M12-pgd-M0", "M12-pgd-M3", "M13", "M14")
STILL = ("M0", "M1", "M3", "M5", "M14")
ROBUST = ("M12-pgd-M0", "M12-pgd-M3", "M12-trades-M0", "M12-trades-M3")
PRIMARY, OTHER = ("L2 0.5",), ("L2 1.5", "L-inf 0.1", "L-inf 0.3")
OWN = PGD("margin", 40, restarts=5, rate=10)
FULL = replace(
    QUICK,
    name="full",
    warning=None,
    models=(
        INDEPENDENT,
        *_models(features=10, fresh=(6, 3, 6), longer=10, seeds=5, others=3),
        *further(Effort(fresh=(6, 3, 6), longer=10, official=(25, 15, 5), adversarial=30)),
    ),
    suite=Suite(
        threats=(*THREATS, Threat("linf", 0.3)),
        groups=(
            # The threat of the primary comparison on the whole test set, more restarts and all else on a part.
            *_attacked(images=None, steps=40, sources=SOURCES, threats=PRIMARY, back=1_000),
            Group("white-box, restarts", (OWN, PGD("dlr", 40, 2, rate=10)), 1_000, threats=PRIMARY, models=MAIN),
            _black(images=500, queries=2_000, threats=PRIMARY, models=MAIN),
            # The standard version is for what is deterministic, "rand" for what draws noise.
            Group("AutoAttack", (AutoAttack("standard"),), 1_000, threats=PRIMARY, models=STILL, once=True),
            Group("AutoAttack, rand", (AutoAttack("rand"),), 1_000, threats=PRIMARY, models=("M4",), once=True),
            *_attacked(images=1_000, steps=40, sources=SOURCES, threats=OTHER, back=200),
            Group("AutoAttack, L-inf", (AutoAttack("standard"),), 1_000, threats=("L-inf 0.3",), models=ROBUST),
            _black(images=100, queries=2_000, threats=OTHER, models=MAIN),
            _black(images=100, queries=2_000, threats=PRIMARY, but=MAIN),
        ),
        probe=Probe(
            500, THREATS[1], RADII, (40, 100, 1_000), tuple((t, draws) for t in THREATS[:2] for draws in (1, 8, 64)), 64
        ),
        draws=8,
        judging_draws=32,
    ),
    drawn=MAIN,
)

PRESETS = {preset.name: preset for preset in (SMOKE, QUICK, FULL)}
