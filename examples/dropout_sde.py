"""What dropout noise does to stability, and why it matters how the equation is read.

On z' = a z the noisy clock gives a geometric Brownian motion, dz = a z (dt + sigma dW). Its growth rate log|z(T)| / T
is a - a^2 sigma^2 / 2 in the Ito reading and a in the Stratonovich reading: only under Ito does this noise add
stability, and it is Ito that the theorems on noise and stability speak of (Liu et al., Neural SDE, 2019).
"""

from __future__ import annotations

import torch

from odelayers import DropoutSDEBlock, EulerMaruyama, ODEBlock, StratonovichHeun

torch.manual_seed(0)
a, p, T, paths = 0.5, 0.5, 4.0, 20_000
start = torch.ones(paths, 1, dtype=torch.float64)


def growth(block: DropoutSDEBlock | ODEBlock) -> tuple[float, float]:
    """Mean of log|z(T)| / T over the paths, and its standard error."""
    rates = block.solve(start, generator=torch.Generator().manual_seed(1)).final.abs().log() / T
    return rates.mean().item(), (rates.std() / paths**0.5).item()


def field(z: torch.Tensor) -> torch.Tensor:
    """A line: z' = a z."""
    return a * z


ito = DropoutSDEBlock(field, p, t1=T, solver=EulerMaruyama(steps=400))
stratonovich = DropoutSDEBlock(field, p, t1=T, solver=StratonovichHeun(steps=400), calculus="stratonovich")
sigma = ito.sigma  # sqrt(p / (1 - p)): matches the variance of one dropout layer per unit of time
exact = {"ito": a - (a * sigma) ** 2 / 2, "stratonovich": a}

for name, block in {"ito": ito, "stratonovich": stratonovich}.items():
    rate, error = growth(block)
    print(f"{name:13} growth rate {rate:.4f} +- {error:.4f}, exact {exact[name]:.4f}")
    assert abs(rate - exact[name]) < 4 * error + 1e-3  # statistical error, and that of 400 steps

# In evaluation the noise is off unless it is asked for: what is left is Euler's method on the ODE.
quiet, steps = ito.eval()(start[:1]).item(), 400
print(f"noise off: z(T) = {quiet:.4f}, Euler's own (1 + aT/n)^n = {(1 + a * T / steps) ** steps:.4f}")
assert abs(quiet - (1 + a * T / steps) ** steps) < 1e-9
assert growth(ODEBlock(field, t1=T))[1] < 1e-12  # no noise, no spread

# The same noise again: given a generator a path can be replayed, and given increments it can be compared.
again = [ito.train().solve(start[:3], generator=torch.Generator().manual_seed(7)).final for _ in range(2)]
assert torch.equal(*again)
