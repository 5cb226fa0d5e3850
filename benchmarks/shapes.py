"""Parameter shapes of torchvision's models, for the gradient ops."""


def _basic(inputs, width, stride):
    yield from ((width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,))
    if stride > 1:
        yield from ((width, inputs, 1, 1), (width,), (width,))


def _bottleneck(inputs, width, stride):
    out = 4 * width
    yield from ((width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,))
    yield from ((out, width, 1, 1), (out,), (out,))
    if inputs != out:
        yield from ((out, inputs, 1, 1), (out,), (out,))


def _resnet(block, expansion, depths):
    shapes, inputs = [(64, 3, 7, 7), (64,), (64,)], 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for i in range(depth):
            shapes += block(inputs, width, 2 if stage and not i else 1)
            inputs = expansion * width
    return [*shapes, (1000, inputs), (1000,)]


def _vit(width, depth, patch=16, tokens=197):
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    head = [(width,), (width,), (1000, width), (1000,)]
    return [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width), *layer * depth, *head]


MODELS = {
    "ResNet-18": _resnet(_basic, 1, (2, 2, 2, 2)),
    "ResNet-50": _resnet(_bottleneck, 4, (3, 4, 6, 3)),
    "ViT-B/16": _vit(768, 12),
    "ViT-L/16": _vit(1024, 24),
}
