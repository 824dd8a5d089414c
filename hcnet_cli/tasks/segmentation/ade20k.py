"""What ADE20K's scene parsing benchmark is: its classes and its numbers of images."""

from __future__ import annotations

from collections.abc import Sequence

NUM_TRAIN, NUM_VAL = 20_210, 2_000  # images of ADE20K
MIN_DISTINCT = 0.99  # of its files have different contents
# The first name of each class in objectInfo150.txt, in its order.
ADE20K_CLASSES = tuple(
    name.strip()
    for name in """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
glass, clock, flag
""".replace("\n", " ")
    .strip()
    .split(",")
)


def is_ade20k(names: Sequence[str], num_train: int, num_val: int, num_distinct: int) -> bool:
    """Whether these are ADE20K's 150 classes, in their order, and its numbers of images, hardly one twice."""
    return (
        (num_train, num_val) == (NUM_TRAIN, NUM_VAL)
        and num_distinct >= MIN_DISTINCT * 2 * (NUM_TRAIN + NUM_VAL)  # images and labels
        and tuple(name.split(",")[0].split(";")[0].strip().lower() for name in names) == ADE20K_CLASSES
    )
