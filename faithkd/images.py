"""The image sets: how many images each has, and of which shape."""

IMAGES = {  # name: (training images, test images, shape); digits is one set that is divided by seed
    "digits": (1397, 400, (1, 8, 8)),
    "mnist": (60_000, 10_000, (1, 28, 28)),
    "fashion_mnist": (60_000, 10_000, (1, 28, 28)),
    "cifar10": (50_000, 10_000, (3, 32, 32)),
}
