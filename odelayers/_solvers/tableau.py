"""Butcher tableaus of explicit Runge-Kutta methods."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DOPRI5", "EULER", "HEUN", "MIDPOINT", "RK4", "TSIT5", "Tableau"]

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method.

    Attributes:
        c: the stages' times, `c[0] = 0`.
        a: one row of weights for each stage after the first.
        b: the weights of the step; equal to the last row of `a` in the adaptive methods, whose last stage is the next
            step's first (FSAL).
        error: `b` less the embedded method's weights; empty for a method without one.
        dense: for each stage the coefficients of theta, theta^2, ... of the continuous extension; empty without one.
        order: the order of the step.
        rows: the weights of each state of a step after the first; the last one is its result.
        columns: for each stage, its weights in the states after it.
    """

    c: Row
    a: tuple[Row, ...]
    b: Row
    order: int
    error: Row = ()
    dense: tuple[Row, ...] = ()
    rows: tuple[Row, ...] = field(init=False, repr=False, compare=False)
    columns: tuple[Row, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = self.a if self.error else (*self.a, self.b)
        columns = tuple(tuple(row[i] for row in rows[i:]) for i in range(len(rows)))
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    def dense_weights(self, theta: float) -> Row:
        """The weights of the stages for the solution at the fraction theta of the step."""
        powers = [theta ** (i + 1) for i in range(len(self.dense[0]))]
        return tuple(sum(p * x for p, x in zip(row, powers, strict=True)) for row in self.dense)


EULER = Tableau(c=(0.0,), a=(), b=(1.0,), order=1)
MIDPOINT = Tableau(c=(0.0, 1 / 2), a=((1 / 2,),), b=(0.0, 1.0), order=2)
HEUN = Tableau(c=(0.0, 1.0), a=((1.0,),), b=(1 / 2, 1 / 2), order=2)
RK4 = Tableau(
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    order=4,
)

# Dormand and Prince 1980; the continuous extension is that of Hairer, Norsett, Wanner, Solving ODEs I, II.6.
DOPRI5 = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    order=5,
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    dense=(
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
)

# Tsitouras 2011, Computers and Mathematics with Applications 62, with its continuous extension.
TSIT5 = Tableau(
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    order=5,
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        0.015151515151515152,
    ),
    dense=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.930296236894751, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.338188630282318, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479368, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
)
