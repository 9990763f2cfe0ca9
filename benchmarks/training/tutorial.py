"""The network of TensorFlow's CIFAR-10 tutorial."""

from typing import Any

from torch import Tensor, nn


class TutorialNet(nn.Module):
    """inference() of TensorFlow's cifar10.py: layers, initial values and the loss terms of its two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        # TensorFlow's lrn(4, bias=1, alpha=0.001/9, beta=0.75) looks 4 channels each way; torch divides alpha by the size.
        lrn = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        # TensorFlow's "SAME" pooling of an even size pads on the right and at the bottom alone, with -inf.
        pool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))  # after a ReLU 0 does for -inf
        conv1, conv2 = nn.Conv2d(3, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
        self.dense1, self.dense2 = nn.Linear(64 * 6 * 6, 384), nn.Linear(384, 192)
        output = nn.Linear(192, 10)
        self.features = nn.Sequential(conv1, nn.ReLU(), pool, lrn, conv2, nn.ReLU(), lrn, pool, nn.Flatten())
        self.classifier = nn.Sequential(self.dense1, nn.ReLU(), self.dense2, nn.ReLU(), output)
        initial: list[Any] = [(conv1, 0.05, 0.0), (conv2, 0.05, 0.1), (self.dense1, 0.04, 0.1), (self.dense2, 0.04, 0.1)]
        for layer, std, bias in [*initial, (output, 1 / 192, 0.0)]:
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def weight_loss(self, weight_decay: float) -> Tensor:
        """weight_decay * 0.5 * ||w||^2 over the two dense layers."""
        return 0.5 * weight_decay * (self.dense1.weight.square().sum() + self.dense2.weight.square().sum())
