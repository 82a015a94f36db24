"""Reference classifiers in plain PyTorch, written from their papers.

Parameters have the names that ours are exported with. `draws` gives a network's random
numbers, in the order of the blocks: a reference with its own randomness could not be
compared.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    half = size // 2
    return nn.Conv2d(inputs, outputs, size, stride, half, groups=groups, bias=bias)


def stages(block, inputs, widths, depth):
    """Modules layer1, layer2, ...: `depth` blocks each, all but the first strided."""
    layers = {}
    for number, width in enumerate(widths, 1):
        blocks = []
        for index in range(depth):
            stride = 2 if number > 1 and index == 0 else 1
            blocks.append(block(inputs, width, stride))
            inputs = width
        layers[f"layer{number}"] = nn.Sequential(*blocks)
    return layers


class Network(nn.Module):
    """A stem, stages, a mean and a linear layer."""

    def __init__(self, stem, layers, features, classes):
        super().__init__()
        self.conv1 = conv(3, stem, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = tuple(layers)
        self.fc = nn.Linear(features, classes)

    def before(self, x):
        return self.bn1(x)

    def after(self, x):
        return F.relu(x)

    def forward(self, x):
        x = self.before(self.conv1(x))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(self.after(x).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(
                conv(inputs, width, 1, stride), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride, inner):
        super().__init__()
        middle, outputs = inner * width, 4 * width
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, 3, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class BottleneckResNet(nn.Module):
    """torchvision's, which strides in the 3x3 convolution; for ImageNet."""

    def __init__(self, classes, width, depths, inner):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, stride, inner))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc, self.count = nn.Linear(inputs, classes), len(depths)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(self.count):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class CifarResNet(Network):
    def __init__(self, classes, width, count, depth):
        widths = [width * 2**i for i in range(count)]
        layers = stages(BasicBlock, width, widths, depth)
        super().__init__(width, layers, widths[-1], classes)
        self.bn1 = nn.BatchNorm2d(width)

    def before(self, x):
        return F.relu(self.bn1(x))

    def after(self, x):
        return x


class WideBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.shortcut = conv(inputs, width, 1, stride) if inputs != width else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = self.shortcut(y) if self.shortcut else x
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(Network):
    def __init__(self, classes, depth, widen):
        widths = [16 * widen * 2**i for i in range(3)]
        layers = stages(WideBlock, 16, widths, (depth - 4) // 6)
        super().__init__(16, layers, widths[-1], classes)
        self.bn1 = nn.BatchNorm2d(widths[-1])

    def before(self, x):
        return x

    def after(self, x):
        return F.relu(self.bn1(x))


class Shaken(torch.autograd.Function):
    """`forward * x`, the gradient `backward` times the output's."""

    @staticmethod
    def forward(context, x, forward, backward):
        context.backward_factor = backward
        return forward * x

    @staticmethod
    def backward(context, gradient):
        return context.backward_factor * gradient, None, None


class ShakeBranch(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class ShakeShortcut(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.conv2 = (conv(inputs, width // 2, 1) for _ in range(2))
        self.bn, self.stride = nn.BatchNorm2d(width), stride

    def forward(self, x):
        x = F.relu(x)
        one = F.avg_pool2d(x, 1, self.stride)
        two = F.avg_pool2d(F.pad(x, (1, -1, 1, -1)), 1, self.stride)
        return self.bn(torch.cat([self.conv1(one), self.conv2(two)], 1))


class ShakeBlock(nn.Module):
    def __init__(self, inputs, width, stride, draws):
        super().__init__()
        self.branch1, self.branch2 = (
            ShakeBranch(inputs, width, stride) for _ in range(2)
        )
        equal = inputs == width
        self.shortcut = None if equal else ShakeShortcut(inputs, width, stride)
        self.draws = draws

    def forward(self, x):
        one, two = self.branch1(x), self.branch2(x)
        x = self.shortcut(x) if self.shortcut else x
        if not self.training:
            return x + (one + two) / 2
        alpha, beta = self.draws()
        one = Shaken.apply(one, alpha, beta)
        return x + one + Shaken.apply(two, 1 - alpha, 1 - beta)


class ShakeShake(Network):
    def __init__(self, classes, width, depth, draws):
        widths = [width * 2**i for i in range(3)]
        layers = stages(lambda *a: ShakeBlock(*a, draws), 16, widths, depth)
        super().__init__(16, layers, widths[-1], classes)
        self.bn1 = nn.BatchNorm2d(16)


class PyramidBlock(nn.Module):
    def __init__(self, inputs, width, stride, keep, draws):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, 4 * width, 1)
        self.bn4 = nn.BatchNorm2d(4 * width)
        self.stride, self.keep, self.draws = stride, keep, draws

    def forward(self, x):
        y = F.relu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn4(self.conv3(F.relu(self.bn3(self.conv2(y)))))
        if self.training:
            uniform, alpha, beta = self.draws()
            gate = torch.floor(self.keep + uniform)
            alpha = 2 * alpha - 1
            forward = gate + alpha - gate * alpha
            y = Shaken.apply(y, forward, gate + beta - gate * beta)
        else:
            y = self.keep * y
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


class PyramidNet(Network):
    def __init__(self, classes, depth, alpha, draws):
        count, inputs, width, layers = (depth - 2) // 9, 16, 16.0, {}
        for stage in range(3):
            blocks = []
            for index in range(count):
                width += alpha / (3 * count)
                keep = 1 - 0.5 * (stage * count + index + 1) / (3 * count)
                stride = 2 if stage > 0 and index == 0 else 1
                made = PyramidBlock(inputs, round(width), stride, keep, draws)
                blocks.append(made)
                inputs = 4 * round(width)
            layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        super().__init__(16, layers, inputs, classes)
        self.bn1, self.bn_final = nn.BatchNorm2d(16), nn.BatchNorm2d(inputs)

    def after(self, x):
        return F.relu(self.bn_final(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.conv_reduce = conv(channels, squeezed, 1, bias=True)
        self.conv_expand = conv(squeezed, channels, 1, bias=True)

    def forward(self, x):
        y = F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv_expand(y))


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd pixel goes to the end."""

    def forward(self, x):
        pads = []
        for side, size, stride in zip(
            x.shape[:1:-1], self.kernel_size, self.stride, strict=True
        ):
            outputs = -(-side // stride)
            total = max((outputs - 1) * stride + size - side, 0)
            pads += [total // 2, total - total // 2]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def as_tensorflow(network):
    """Replaces padding and epsilon by those of TensorFlow's EfficientNets."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__, module.padding = SameConv, (0, 0)
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return network


class MBConv(nn.Module):
    def __init__(self, inputs, width, expand, size, stride, rate, draws, lite=False):
        super().__init__()
        middle = expand * inputs
        self.activation = F.relu6 if lite else F.silu
        self.expand = expand > 1
        if self.expand:
            self.conv_pw, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        depthwise = conv(middle, middle, size, stride, groups=middle)
        self.conv_dw = depthwise
        self.se = nn.Identity() if lite else SqueezeExcite(middle, inputs // 4)
        norms = [nn.BatchNorm2d(middle), nn.BatchNorm2d(width)]
        if self.expand:
            self.conv_pwl = conv(middle, width, 1)
            self.bn2, self.bn3 = norms
        else:
            self.conv_pw = conv(middle, width, 1)
            self.bn1, self.bn2 = norms
        self.skip, self.rate, self.draws = stride == 1 and inputs == width, rate, draws

    def forward(self, x):
        y = x
        if self.expand:
            y = self.activation(self.bn1(self.conv_pw(y)))
            y = self.se(self.activation(self.bn2(self.conv_dw(y))))
            y = self.bn3(self.conv_pwl(y))
        else:
            y = self.se(self.activation(self.bn1(self.conv_dw(y))))
            y = self.bn2(self.conv_pw(y))
        if not self.skip:
            return y
        if self.training and self.rate:
            (uniform,) = self.draws()
            y = y * (uniform >= self.rate) / (1 - self.rate)
        return x + y


class EfficientNet(nn.Module):
    """timm's and torchvision's: PyTorch's padding, epsilon 1e-5; stages as ours."""

    def __init__(self, classes, stem, top, table, drop_path, draws, lite=False):
        super().__init__()
        self.activation = F.relu6 if lite else F.silu
        self.conv_stem, self.bn1 = conv(3, stem, 3, 2), nn.BatchNorm2d(stem)
        total, number, inputs, rows = sum(depth for *_, depth in table), 0, stem, []
        for expand, size, stride, width, depth in table:
            row = []
            for index in range(depth):
                rate = drop_path * number / total
                step = stride if index == 0 else 1
                row.append(MBConv(inputs, width, expand, size, step, rate, draws, lite))
                inputs, number = width, number + 1
            rows.append(nn.Sequential(*row))
        self.blocks = nn.Sequential(*rows)
        self.conv_head, self.bn2 = conv(inputs, top, 1), nn.BatchNorm2d(top)
        self.classifier = nn.Linear(top, classes)

    def forward(self, x):
        x = self.blocks(self.activation(self.bn1(self.conv_stem(x))))
        x = self.activation(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))
