"""Is an equilibrium of a field stable? Ask the eigenvalues, bound them without eigenvalues, and try it.

Three fields on 8 dimensions with an equilibrium at 0, and what happens to a small push on each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odelayers import (
    MLP,
    Dopri5,
    LyapunovRegularizer,
    ODEBlock,
    check_stability,
    gershgorin,
    jacobian,
    spectral_abscissa,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
dim = 8


class Linear(nn.Module):
    """z' = tanh(A z): its Jacobian at 0 is A."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = A

    def forward(self, z: Tensor) -> Tensor:
        """Give dz/dt at states (B, 8)."""
        return torch.tanh(z @ self.A.T)


off = 0.1 * torch.randn(dim, dim)
dominant = off - 2 * torch.eye(dim)
growing_first = torch.diag(torch.full((dim - 1,), 2.0), 1) - torch.eye(dim)  # eigenvalues -1, far from normal
unstable = off + 0.5 * torch.eye(dim)

origin, push = torch.zeros(1, dim), 1e-3 * torch.nn.functional.normalize(torch.randn(64, dim), dim=1)
for name, A in {"diagonally dominant": dominant, "stable, not normal": growing_first, "unstable": unstable}.items():
    f = Linear(A)
    report = check_stability(f, origin)
    J = jacobian(f, origin)
    centres, radii = gershgorin(J)
    bound = (centres + radii).amax().item()
    block = ODEBlock(f, solver=Dopri5(rtol=1e-8, atol=1e-12))
    sizes = block.solve(push, ts=torch.linspace(0, 40, 201)).zs.norm(dim=2) / 1e-3
    grown, left = sizes.amax().item(), sizes[-1].amax().item()
    print(f"{name}: abscissa {report.abscissa.item():.2f}, Gershgorin's bound {bound:.2f}, ", end="")
    print(f"log norm {report.log_norm_2.item():.2f}: {report.verdict[0]}; a push grows {grown:.2f}x, ends {left:.1e}x")
    assert torch.allclose(J[0], A)
    assert report.abscissa.item() <= min(bound, report.log_norm_2.item()) + 1e-9  # both are upper bounds
    if name == "diagonally dominant":  # Gershgorin's discs alone prove it, and distances never grow
        assert bound < 0 and grown <= 1 + 1e-9 and left < 1e-3
    elif name == "unstable":
        assert report.verdict == ["unstable"] and left > 10
    else:  # an eigenvalue tells the end of the story, not its beginning
        assert report.abscissa.item() < 0 < report.log_norm_2.item() and grown > 2

# A field can be made stable at the points that matter: the penalty asks for f = 0 and a dominant diagonal there.
f, points = MLP(dim, (32,)), torch.randn(128, dim)
before = spectral_abscissa(jacobian(f, points)).amax().item()
regularizer, optimiser = LyapunovRegularizer(diagonal_margin=1.0), torch.optim.Adam(f.parameters(), lr=1e-2)
for _ in range(300):
    optimiser.zero_grad()
    regularizer(f, points).backward()
    optimiser.step()
report = check_stability(f, points)
after = report.abscissa.amax().item()
print(f"regularised: largest abscissa over {len(points)} points {before:.2f} -> {after:.2f}\n{report}")
assert before > 0 > after
