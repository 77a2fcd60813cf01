"""Procedural people and animals.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, lathe, lean, moved, rod, tube,
)  # fmt: skip

SKIN = ((0.85, 0.66, 0.54), (0.74, 0.54, 0.42), (0.5, 0.34, 0.25), (0.92, 0.76, 0.66))
HAIR = ((0.12, 0.09, 0.07), (0.3, 0.2, 0.12), (0.5, 0.36, 0.2), (0.75, 0.62, 0.4), (0.5, 0.5, 0.5))
CLOTH = ((0.2, 0.25, 0.4), (0.3, 0.35, 0.5), (0.75, 0.5, 0.5), *BRIGHT, *PLAIN, *WOOD[:2])
FUR = ((0.75, 0.5, 0.28), (0.5, 0.32, 0.18), (0.88, 0.78, 0.6), (0.2, 0.16, 0.14), (0.92, 0.9, 0.88), (0.5, 0.48, 0.46))


def between(u: Draw, point, spread: float) -> np.ndarray:
    return np.asarray(point) + u.rng.uniform(-spread, spread, 3)


def person(
    u: Draw, h: float, female: bool, head: float, lying: float, sitting: float, dummy: bool = False
) -> list[Part]:
    """A person of height h whose head is `head` h high; `lying` and `sitting` are chances, the rest stand."""
    skin = u.colour(PLAIN) if dummy else u.colour(SKIN)
    hair, shirt, trousers, shoe = u.colour(HAIR), u.colour(CLOTH), u.colour(CLOTH), u.colour(PLAIN[2:], WOOD, CLOTH)
    draw = u(0, 1)
    pose = "lying" if draw < lying else "sitting" if draw < lying + sitting else "standing"
    stout, hip = u(0.85, 1.15), h * 0.5
    wide, deep, neck = h * 0.12 * stout * (0.92 if female else 1.05), h * 0.065 * stout, h * (1 - head * 1.15)
    waist, hips = wide * (u(0.6, 0.75) if female else u(0.8, 0.95)), wide * (u(0.8, 0.95) if female else u(0.7, 0.85))
    profile = [
        (hips * 0.7, hip - h * 0.03),
        (hips, hip + h * 0.02),
        (waist, hip + h * 0.13),
        (wide * 0.9, neck - h * 0.1),
    ]
    profile += [(wide * 0.85, neck - h * 0.03), (h * 0.03, neck)]
    parts = [lathe(profile, shirt, flat=deep / wide)]
    face = h * head
    parts += [
        cone(h * 0.05, h * 0.05, h * 0.05, 0, neck - h * 0.01, 0, skin),
        ball(face * 0.75, face, face * 0.85, 0, neck + face * 0.12, 0.01, skin),
    ]
    parts.append(ball(face * 0.85, face * 0.75, face * 0.9, 0, neck + face * 0.45, -face * 0.1, hair))
    if female and u.chance(0.75):
        long = u(0.6, 1.8) * face
        parts.append(cone(face * 0.75, long, face * 0.45, 0, neck + face * 0.8 - long, -face * 0.3, hair, u(0.7, 1.1)))
    sleeve, arm = u.chance(0.6), h * 0.05 * stout
    for side in (-1, 1):
        shoulder = np.array([side * wide * 0.95, neck - h * 0.04, 0])
        if dummy or u.chance(0.45):  # hanging
            elbow = np.add(shoulder, (side * h * u(0.01, 0.05), -h * 0.16, u(-0.03, 0.02) * h))
            hand = np.add(elbow, (side * h * u(-0.02, 0.03), -h * 0.15, u(0, 0.06) * h))
        elif u.chance(0.5):  # hand on the hip
            elbow = np.add(shoulder, (side * h * 0.1, -h * 0.14, -h * 0.04))
            hand = np.array([side * hips, hip + h * 0.06, h * 0.03])
        else:
            elbow = between(u, np.add(shoulder, (side * h * 0.04, -h * 0.15, h * 0.02)), h * 0.03)
            hand = elbow + np.array([u(-0.08, 0.06) * h * side, u(-0.1, 0.12) * h, u(0.06, 0.14) * h])
        parts.append(rod(shoulder, elbow, arm * 1.15, shirt, 0.85))
        parts.append(rod(elbow, hand, arm, shirt if sleeve else skin, 0.7))
        parts.append(ball(arm * 1.1, arm * 1.6, arm, *(np.subtract(hand, (0, arm * 0.8, 0))), skin))
    bare = female and u.chance(0.3)
    leg = skin if bare else trousers
    spread, stride = u(0, 0.06) * h, u(-0.08, 0.08) * h
    for side in (-1, 1):
        top = np.array([side * hips * 0.5, hip, 0])
        if pose == "sitting":
            knee = np.add(top, (side * u(0, 0.05) * h, u(-0.02, 0.05) * h, 0.23 * h))
            foot = (
                np.add(knee, (0, -0.24 * h, u(-0.06, 0.1) * h))
                if u.chance(0.6)
                else np.add(knee, (0, -0.12 * h, 0.2 * h))
            )
        else:
            knee = np.add(top, (side * spread / 2, -0.25 * h, side * stride / 2 + 0.01 * h))
            foot = np.array([side * (hips * 0.5 + spread), 0.03 * h, side * stride])
        parts.append(rod(top, knee, h * 0.085 * stout, leg, 0.75))
        parts.append(rod(knee, foot, h * 0.06 * stout, leg, u(0.6, 1.3)))
        x, y, z = foot
        parts.append(box(h * 0.045, h * 0.035, h * 0.13, x, y - 0.03 * h, z + 0.03 * h, shoe))
    if bare:
        low = u(0.3, 0.45) * h
        parts += (
            [cone(hips * 2.1, hip - low + h * 0.05, deep * 2.4, 0, low, 0, trousers, u(0.7, 1))]
            if pose != "sitting"
            else []
        )
        if pose == "sitting":
            parts.append(box(hips * 2, h * 0.09, h * 0.2, 0, hip - h * 0.05, h * 0.1, trousers))
    if not female and u.chance(0.5):  # an open jacket over a shirt
        parts.append(box(wide * 0.5, h * 0.3, deep * 0.3, 0, hip + h * 0.03, deep * 0.85, u.colour(PLAIN, CLOTH)))
    if pose == "lying":
        return moved(parts, lean(u.pick(-1, 1) * math.pi / 2, u(-0.2, 0.2)))
    return moved(parts, lean(0, u(-0.3, 0.3)))


def woman(u: Draw) -> list[Part]:
    return person(u, u(1.55, 1.8), True, 0.125, 0.0, 0.15)


def man(u: Draw) -> list[Part]:
    return person(u, u(1.65, 1.95), False, 0.125, 0.3, 0.15)


def girl(u: Draw) -> list[Part]:
    return person(u, u(1.0, 1.6), True, u(0.14, 0.17), 0.1, 0.45)


def boy(u: Draw) -> list[Part]:
    return person(u, u(1.0, 1.6), False, u(0.14, 0.17), 0.25, 0.3)


def mannequin(u: Draw) -> list[Part]:
    return person(u, u(1.65, 1.95), u.chance(0.5), 0.125, 0, 0, dummy=True)


def four_legged(
    u: Draw, long: float, high: float, thick: float, neck: float, head: float, snout: float, tail: float
) -> list[Part]:
    """A standing animal; the lengths are of the body, the shoulders, the body's thickness, and so on."""
    fur, second = u.colour(FUR), u.colour(FUR)
    dark = second if u.chance(0.4) else fur
    leg, y = thick * u(0.28, 0.36), high - thick / 2
    parts = [rod((0, y, -long / 2), (0, y, long / 2), thick, fur, u(0.85, 1.15), flat=u(0.75, 0.95))]
    parts += [ball(thick, thick, thick * 0.7, 0, y - thick / 2, z * long / 2, fur) for z in (-1, 1)]
    for side in (-1, 1):
        for end in (-1, 1):
            x, z = side * thick * 0.3, end * long * 0.47
            step = u(-0.1, 0.1) * high
            knee = (x, (high - thick) * 0.55, z + step / 2 - end * 0.02)
            parts.append(rod((x, y - thick * 0.2, z), knee, leg * 1.5, fur, 0.7))
            parts.append(rod(knee, (x, 0, z + step), leg, dark, 0.8))
            parts.append(box(leg * 1.1, leg * 0.6, leg * 1.6, x, 0, z + step + leg * 0.3, dark))
    rise = u(0.5, 1.1)
    top = np.array([0, y + thick * 0.2 + neck * math.sin(rise), long / 2 + neck * math.cos(rise)])
    parts.append(rod((0, y + thick * 0.1, long * 0.45), top, thick * u(0.6, 0.75), fur, 0.65))
    parts.append(ball(head * 0.8, head, head, 0, top[1] - head * 0.4, top[2], fur))
    parts.append(rod(top, np.add(top, (0, -snout * u(0.2, 0.8), snout * 1.2)), head * 0.6, dark, 0.6))
    ears = u(0.3, 0.6) * head
    for side in (-1, 1):
        parts.append(
            rod(
                np.add(top, (side * head * 0.3, head * 0.4, 0)),
                np.add(top, (side * head * u(0.35, 0.6), head * 0.4 + ears, 0)),
                ears * 0.7,
                dark,
                0.2,
            )
        )
    end = np.array([0, y + thick * 0.25 + tail * u(-0.7, 0.6), -long / 2 - tail * 0.7])
    parts.append(rod((0, y + thick * 0.25, -long / 2), end, thick * 0.18, dark, u(0.4, 1)))
    return parts


def sitting(u: Draw, h: float, snout: float, ear: float) -> list[Part]:
    """An animal that sits upright on its hind legs."""
    fur, second = u.colour(FUR), u.colour(FUR)
    dark, w = (second if u.chance(0.4) else fur), h * u(0.38, 0.5)
    head = h * u(0.26, 0.34)
    parts = [
        rod((0, h * 0.05, -h * 0.15), (0, h * 0.72, h * 0.08), w, fur, 0.6),
        ball(w * 1.1, w * 0.8, w * 1.3, 0, 0, -h * 0.12, fur),
    ]
    y, z = h * 0.68, h * 0.12
    parts.append(ball(head, head, head, 0, y, z, fur))
    parts.append(
        rod((0, y + head * 0.4, z + head * 0.3), (0, y + head * 0.3, z + head * 0.4 + snout), head * 0.5, dark, 0.6)
    )
    for side in (-1, 1):
        parts.append(rod((side * w * 0.22, h * 0.5, h * 0.12), (side * w * 0.25, 0, h * 0.25), w * 0.25, dark, 0.8))
        parts.append(ball(w * 0.3, w * 0.2, w * 0.5, side * w * 0.5, 0, h * 0.1, dark))
        tip = (side * head * 0.42, y + head + ear * u(-1, 1), z)
        parts.append(rod((side * head * 0.3, y + head * 0.85, z), tip, head * 0.25, dark, 0.3))
    tail = arc(h * 0.25, -math.pi / 2, u(-0.2, 1.2))[:, [0, 2, 1]]
    return [*parts, tube(tail, w * 0.15, dark, (0, w * 0.1, -h * 0.1))]


def dog(u: Draw) -> list[Part]:
    if u.chance(0.35):
        return sitting(u, u(0.5, 0.9), u(0.08, 0.14), 0.12)
    size = u(0.4, 0.7)
    return four_legged(
        u,
        size,
        size * u(0.7, 1),
        size * u(0.3, 0.5),
        size * u(0.15, 0.35),
        size * u(0.25, 0.35),
        size * 0.2,
        size * u(0.1, 0.5),
    )


def cat(u: Draw) -> list[Part]:
    if u.chance(0.4):
        return sitting(u, u(0.35, 0.55), 0.03, 0.05)
    size = u(0.3, 0.42)
    return four_legged(
        u, size, size * u(0.65, 0.8), size * u(0.3, 0.4), size * 0.15, size * 0.3, size * 0.08, size * u(0.6, 1)
    )


def horse(u: Draw) -> list[Part]:
    toy = u.chance(0.3)
    size = u(0.4, 0.5) if toy else u(1.3, 1.6)
    parts = four_legged(
        u, size, size * u(0.9, 1.1), size * u(0.27, 0.34), size * u(0.4, 0.55), size * 0.22, size * 0.32, size * 0.4
    )
    mane = u.colour(FUR)
    y = size * 1.1
    parts += [rod((0, y - size * 0.1, size * 0.55), (0, y + size * 0.25, size * 0.75), size * 0.12, mane, flat=0.4)]
    if toy:  # on rockers
        wood, wide = u.colour(WOOD, BRIGHT), size * 0.2
        path = arc(size * 1.0, math.pi * 1.2, math.pi * 1.8)[:, [2, 1, 0]]
        parts += [tube(path, 0.04, wood, (side * wide, size * 0.95, 0)) for side in (-1, 1)]
        parts += [box(2 * wide, 0.03, 0.05, 0, 0, z * size, wood) for z in (-0.35, 0.35)]
    return parts


def chicken(u: Draw) -> list[Part]:
    if u.chance(0.4):  # roast
        brown, w = u.colour(((0.8, 0.45, 0.12), (0.6, 0.32, 0.1))), u(0.14, 0.2)
        parts = [ball(w, w * 0.7, w * 1.4, 0, 0, 0, brown)]
        for side in (-1, 1):
            knee = (side * w * 0.35, w * u(0.3, 0.6), w * u(0.7, 0.9))
            parts += [
                rod((side * w * 0.35, w * 0.35, w * 0.2), knee, w * 0.4, brown, 0.4),
                ball(w * 0.17, w * 0.17, w * 0.17, *knee, brown),
            ]
            parts.append(
                rod((side * w * 0.45, w * 0.4, -w * 0.3), (side * w * 0.6, w * 0.3, w * 0.1), w * 0.2, brown, 0.7)
            )
        return parts
    feather, tail, red, h = u.colour(FUR), u.colour(FUR), BRIGHT[0], u(0.35, 0.5)
    parts = [
        ball(h * 0.45, h * 0.45, h * 0.65, 0, h * 0.25, 0, feather),
        rod((0, h * 0.5, h * 0.2), (0, h * 0.85, h * 0.3), h * 0.28, feather, 0.5),
    ]
    parts += [
        ball(h * 0.16, h * 0.17, h * 0.18, 0, h * 0.8, h * 0.3, feather),
        box(h * 0.03, h * 0.12, h * 0.14, 0, h * 0.92, h * 0.3, red),
    ]
    parts.append(rod((0, h * 0.87, h * 0.38), (0, h * 0.86, h * 0.47), h * 0.06, (0.85, 0.65, 0.2), 0.2))
    for angle in (0.3, 0.6, 0.9):
        parts.append(
            rod(
                (0, h * 0.5, -h * 0.25),
                (0, h * (0.5 + 0.4 * math.sin(angle)), -h * (0.25 + 0.4 * math.cos(angle))),
                h * 0.15,
                tail,
                0.8,
                flat=0.3,
            )
        )
    for side in (-1, 1):
        parts.append(ball(h * 0.08, h * 0.3, h * 0.45, side * h * 0.21, h * 0.33, -h * 0.03, tail))
        parts += [
            rod((side * h * 0.1, h * 0.3, 0), (side * h * 0.1, 0, 0), h * 0.04, (0.8, 0.6, 0.25)),
            box(h * 0.12, h * 0.02, h * 0.14, side * h * 0.1, 0, h * 0.03, (0.8, 0.6, 0.25)),
        ]
    return parts


def bear(u: Draw) -> list[Part]:
    """A teddy bear that sits."""
    fur, light, h = u.colour(FUR[:4], BRIGHT), u.colour(FUR[:3]), u(0.25, 0.4)
    head, body = h * u(0.36, 0.44), h * u(0.4, 0.5)
    parts = [ball(body, h * 0.58, body * 0.85, 0, 0, 0, fur), ball(head * 1.1, head, head, 0, h * 0.52, 0, fur)]
    parts += [
        ball(head * 0.5, head * 0.4, head * 0.35, 0, h * 0.54, head * 0.35, light),
        ball(head * 0.14, head * 0.12, head * 0.12, 0, h * 0.62, head * 0.5, PLAIN[3]),
    ]
    parts += [ball(head * 0.1, head * 0.1, head * 0.1, x * head, h * 0.7, head * 0.42, PLAIN[3]) for x in (-0.2, 0.2)]
    for side in (-1, 1):
        parts.append(ball(head * 0.38, head * 0.38, head * 0.2, side * head * 0.45, h * 0.52 + head * 0.72, 0, fur))
        parts.append(
            rod(
                (side * body * 0.4, h * 0.45, 0),
                (side * body * u(0.7, 1), h * u(0.15, 0.5), h * u(0, 0.2)),
                body * 0.38,
                fur,
                0.9,
            )
        )
        parts.append(
            rod(
                (side * body * 0.3, h * 0.1, h * 0.05),
                (side * body * u(0.4, 0.7), h * 0.1, h * 0.4),
                body * 0.4,
                fur,
                1.0,
            )
        )
        parts.append(ball(body * 0.4, body * 0.45, body * 0.15, side * body * 0.55, h * 0.02, h * 0.38, light))
    return parts


FIGURES: dict[str, Callable[[Draw], list[Part]]] = {
    "bear": bear, "boy": boy, "cat": cat, "chicken": chicken, "dog": dog, "girl": girl, "horse": horse, "man": man,
    "mannequin": mannequin, "woman": woman,
}  # fmt: skip
