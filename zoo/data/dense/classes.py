"""Names and colours of the classes of ADE20K (arXiv 1608.05442), Cityscapes (1604.01685) and Pascal VOC."""

import numpy as np
from torchvision.datasets import Cityscapes

__all__ = ["ADE20K", "ADE20K_COLORS", "CITYSCAPES", "CITYSCAPES_COLORS", "CITYSCAPES_LABELS", "VOC", "distinct_colors"]

Colors = tuple[tuple[int, int, int], ...]


def distinct_colors(count: int) -> Colors:
    """Colours of the classes 0 to ``count`` - 1 in Pascal VOC, whose rule goes on for other data sets.

    The three lowest bits of a number are the highest bits of red, green and blue, the next three the second highest,
    and so on.
    """
    numbers = np.arange(count)[:, None] >> np.arange(0, 24, 3)  # a column for every bit of a channel, highest first
    channels = [((numbers >> channel & 1) << np.arange(7, -1, -1)).sum(1).tolist() for channel in range(3)]
    return tuple(zip(*channels, strict=True))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _colors(text: str) -> Colors:
    """Colours written as six hexadecimal digits each."""
    return tuple(map(tuple, np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3).tolist()))


_trained = [known for known in Cityscapes.classes if known.train_id in range(19)]

CITYSCAPES = tuple(known.name for known in _trained)
CITYSCAPES_COLORS: Colors = tuple(known.color for known in _trained)
CITYSCAPES_LABELS = {known.id: known.train_id for known in Cityscapes.classes if known.id >= 0}  # 255 is ignored

VOC = _names(
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)

ADE20K = _names(
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)
ADE20K_COLORS = _colors(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
