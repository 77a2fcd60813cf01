"""The point operations alone in a PointNet++ layer: `python examples/pointnet2.py` tells balls from boxes.

Needs torch and pointalign_kernels, nothing of pointalign.
"""

import torch
from torch import Tensor, nn

from pointalign_kernels import farthest_point_sample, knn


class SetAbstraction(nn.Module):
    """Centres by farthest-point sampling, their nearest neighbours, a shared MLP and the maximum over neighbours.

    Args:
        features: F of the input.
        width: W of the output.
        centres: G, points that are left.
        neighbours: k of each centre.
    """

    def __init__(self, features: int, width: int, centres: int, neighbours: int):
        super().__init__()
        self.centres, self.neighbours = centres, neighbours
        self.mlp = nn.Sequential(nn.Linear(3 + features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """`xyz [B, N, 3]`, `features [B, N, F]` -> centres `[B, G, 3]` and their features `[B, G, W]`."""
        rows = torch.arange(len(xyz), device=xyz.device)[:, None]
        centres = xyz[rows, farthest_point_sample(xyz, self.centres)]
        _, index = knn(centres, xyz, self.neighbours)  # [B, G, k]
        relative = xyz[rows[..., None], index] - centres[:, :, None]
        grouped = torch.cat([relative, features[rows[..., None], index]], dim=-1)  # [B, G, k, 3 + F]
        return centres, self.mlp(grouped).amax(dim=2)


class PointNet2(nn.Module):
    """Two layers of set abstraction and a head over the whole cloud: `xyz [B, N, 3]` -> logits `[B, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SetAbstraction(3, 32, centres=64, neighbours=16), SetAbstraction(32, 64, 16, 8)
        self.head = nn.Linear(64, 2)

    def forward(self, xyz: Tensor) -> Tensor:
        return self.head(self.second(*self.first(xyz, xyz))[1].amax(dim=1))


def clouds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Surfaces of balls (0) and boxes (1), `[count, 256, 3]`, and their labels."""
    points = torch.randn(count, 256, 3, generator=generator)
    labels = torch.arange(count) % 2
    balls, boxes = points / points.norm(dim=-1, keepdim=True), points / points.abs().amax(dim=-1, keepdim=True)
    return torch.where(labels[:, None, None] == 1, boxes * 0.8, balls), labels


def main(steps: int = 40) -> float:
    """Returns the share of unseen clouds that are told apart."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = PointNet2()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        xyz, labels = clouds(16, generator)
        loss = nn.functional.cross_entropy(model(xyz), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    xyz, labels = clouds(64, generator)
    with torch.no_grad():
        accuracy = (model(xyz).argmax(dim=1) == labels).float().mean().item()
    print(f"unseen clouds told apart: {100 * accuracy:.0f} %")
    return accuracy


if __name__ == "__main__":
    main()
