"""Coefficients of Rosenbrock methods, in the form that needs no product with the Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RODAS5P", "RosenbrockTableau"]

Row = tuple[float, ...]


@dataclass(frozen=True)
class RosenbrockTableau:
    """A Rosenbrock method in the variables u of Hairer and Wanner, Solving ODEs II, IV.7.

    With J = df/dz and W = I - gamma h J, stage i solves
    W u_i = gamma (h f(t + c_i h, z + sum_j a_ij u_j) + sum_j e_ij u_j + d_i h^2 df/dt); the step is z + sum_i b_i u_i.

    Attributes:
        gamma: the diagonal of the method; every stage shares the matrix W.
        c: the stages' times.
        a: one row of weights for each stage after the first.
        e: the weights of the earlier stages in the equation for u, one row for each stage after the first.
        d: the weights of the field's derivative in time.
        b: the weights of the step; the last stage is also the estimate of the error.
        order: the order of the step; that of the embedded method is one less.
    """

    gamma: float
    c: Row
    a: tuple[Row, ...]
    e: tuple[Row, ...]
    d: Row
    b: Row
    order: int


_LAST = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)

# Steinebach, Construction of Rosenbrock-Wanner method Rodas5P and numerical benchmarks within the Julia Differential
# Equations package, BIT Numerical Mathematics 63:27 (2023).
RODAS5P = RosenbrockTableau(
    gamma=0.21193756319429014,
    c=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
    a=(
        (3.0,),
        (2.849394379747939, 0.45842242204463923),
        (-6.954028509809101, 2.489845061869568, -10.358996098473584),
        (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
        _LAST,
        (*_LAST, 1.0),
        (*_LAST, 1.0, 1.0),
    ),
    e=(
        (-14.155112264123755,),
        (-17.97296035885952, -2.859693295451294),
        (147.12150275711716, -1.41221402718213, 71.68940251302358),
        (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
        (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
        (
            30.91273214028599,
            -3.1208243349937974,
            77.79954646070892,
            34.28646028294783,
            -19.097331116725623,
            -28.087943162872662,
        ),
        (
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ),
    ),
    d=(
        0.21193756319429014,
        -0.42387512638858027,
        -0.3384627126235924,
        1.8046452872882734,
        2.325825639765069,
        0.0,
        0.0,
        0.0,
    ),
    b=(*_LAST, 1.0, 1.0, 1.0),
    order=5,
)
